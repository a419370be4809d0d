"""One picture on many devices: the same as on one; what is asked of devices, and refused."""

import base64
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx2 as httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from jaxspd import devices
from jaxspd.convert.pipeline_folder import convert_pipeline
from jaxspd.devices import Degrees, say_layout, spread_over
from jaxspd.errors import UsageError
from jaxspd.families import open_family
from jaxspd.target import SAMPLES, TOKENS, Target
from tests import tiny
from tests.serving import GENERATIONS, SMALL, pixels, serving_process
from tests.spread import CASES, environment
from tests.test_lora import flux1_kohya, write

MODELS = {
    "flux1": "flux1_folder",
    "klein-base": "klein_base_folder",
    "z_image": "z_image_folder",
    "qwen_image": "qwen_image_folder",
    "wan": "wan22_folder",
    "orbax": "converted_folder",
    "lora": "lora_file",
}


@pytest.fixture(scope="module")
def wan22_folder(tmp_path_factory):
    """Two transformers that take turns."""
    return tiny.write_wan(tmp_path_factory.mktemp("wan22") / "model", num_layers=1, boundary_ratio=0.7)


@pytest.fixture(scope="module")
def converted_folder(qwen_image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("orbax") / "model"
    convert_pipeline(open_family(qwen_image_folder), folder, "orbax")
    return folder


@pytest.fixture(scope="module")
def lora_file(flux1_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "kohya.safetensors"
    write(open_family(flux1_folder), flux1_kohya, path)
    return path


@pytest.fixture(scope="module")
def answers(request):
    """What `tests.spread` says of each of its cases."""
    folders = [f"{name}={request.getfixturevalue(fixture)}" for name, fixture in MODELS.items()]
    command = [sys.executable, "-m", "tests.spread", *folders]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {answer["case"]: answer for answer in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("case", CASES)
def test_many_devices_compute_what_one_does(answers, case):
    answer = answers[case]
    assert answer["stages"] == (1 if "not guided" in case else 2)
    assert max(answer["forward"]) <= 1e-5
    assert min(answer["size"]) > 1
    assert answer["levels"] <= 1
    assert answer["range"] > 100


@pytest.mark.parametrize("case", CASES)
def test_the_work_is_shared(answers, case):
    answer = answers[case]
    # All tokens are traded for heads at once, and back; Wan attends to its text for itself.
    assert 0 < answer["layers"] == answer["exchanges"].count(4 if case == "ulysses of both" else 2)
    # Weights are gathered by the layer that needs them, or by none.
    sharded = "fsdp" in case
    assert answer["gathering"] == (answer["layers"] if sharded else 0)
    # All but vectors, and a few matrices that six devices do not divide.
    assert answer["held"] < 0.2 * answer["weights"] if sharded else answer["held"] == answer["weights"]


def test_rows_are_decoded_side_by_side(answers):
    answer = answers["decoding"]
    assert answer["difference"] <= 1e-5
    # Of twelve rows of latents a device of eight has two at most, and the two beside these.
    assert all(part < 0.4 * whole for part, whole in zip(answer["parts"], answer["whole"], strict=True))


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ({}, (2, 4)),
        ({"ulysses_degree": 8}, (1, 8)),
        ({"ulysses_degree": 4}, (2, 4)),
        ({"enable_cfg_parallel": False}, (1, 8)),
        ({"enable_cfg_parallel": True}, (2, 4)),
        ({"num_gpus": 3}, (1, 3)),
        ({"num_gpus": 1, "ulysses_degree": 1}, (1, 1)),
    ],
    ids=str,
)
def test_degrees_that_are_not_given_are_chosen(asked, shape):
    assert Degrees(**{"num_gpus": 8} | asked).shape() == shape


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num-gpus", "2"], "--num-gpus is 2, and JAX sees 1; use 1 or fewer"),
        (["--num-gpus", "0"], "--num-gpus must be a whole number of 1 or more, not 0"),
        (["--num-gpus", "8", "--ulysses-degree", "3"], "use 8 or 4, or leave it out"),
        (["--num-gpus", "6", "--ulysses-degree", "4", "--enable-cfg-parallel", "false"], "use 6, or leave"),
        (["--ulysses-degree", "2"], "--ulysses-degree 2 does not make use of --num-gpus 1"),
        (["--num-gpus", "3", "--enable-cfg-parallel", "true"], "needs an even --num-gpus, not 3"),
        (["--fsdp", "true"], "needs --num-gpus 2 or more"),
        (["--tp-size", "2"], "--tp-size must be 1: matrices that are split"),
        (["--ring-degree", "2"], "use --ulysses-degree"),
        *((["--shard", text], "shard must be I/N") for text in ("0/2", "3/2", "1", "1/2/3", "a/b")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_devices_cannot_do_is_refused(refused, flags, said):
    assert said in refused(*flags)


@pytest.mark.parametrize("value", ["two", True, 1.5])
def test_a_configuration_is_checked_too(value):
    with pytest.raises(UsageError, match="num_gpus must be a whole number of 1 or more"):
        Degrees(num_gpus=value)


@pytest.mark.parametrize(
    ("limit", "asked", "sharded"), [(10**9, None, False), (10**5, None, True), (10**5, False, False)]
)
def test_weights_are_sharded_where_one_device_cannot_hold_them(
    flux1_folder, monkeypatch, caplog, limit, asked, sharded
):
    monkeypatch.setattr(devices, "memory_limit", lambda device: limit)
    # A device may be named twice as long as nothing runs.
    twice = jax.local_devices()[:1] * 2
    monkeypatch.setattr(devices.jax, "local_devices", lambda: twice)
    monkeypatch.setattr(Target, "over", lambda target, which, samples, shard, _: (len(which), samples, shard))
    family = open_family(flux1_folder)
    chosen = spread_over(Target(), family, jnp.float32, Degrees(2, fsdp=asked))
    assert chosen == (2, 2, sharded)
    monkeypatch.undo()
    mesh = AbstractMesh((2, 1), (SAMPLES, TOKENS))
    say_layout(replace(Target(), mesh=mesh, shard_weights=sharded, memory=limit), family, jnp.float32)
    assert ("quantize int8 takes half" in caplog.text) == sharded


def test_a_server_has_many_devices(toy_folder, toy_generator):
    body = {"prompt": "a lake", "size": "96x64", "response_format": "b64_json", **SMALL}
    flags = "--xla_force_host_platform_device_count=2"
    with serving_process(toy_folder, "--num-gpus=2", XLA_FLAGS=flags) as (_, url, lines):
        assert "spread over 2 devices" in "".join(lines)
        answer = httpx.post(url + GENERATIONS, json=body, timeout=60).json()
    [alone] = toy_generator.iterate(
        {"prompt": "a lake", "width": 96, "height": 64, **SMALL}, save_output=False, show_progress=False
    )
    picture = pixels(base64.b64decode(answer["data"][0]["b64_json"]))
    assert np.abs(picture.astype(int) - alone.frames[0]).max() <= 1
