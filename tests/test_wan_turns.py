"""Wan 2.2, whose two transformers take turns: beside diffusers, beside the reference, in little memory."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from safetensors.numpy import save_file

from jaxspd import DiffGenerator, UsageError
from jaxspd.cli import main
from jaxspd.components.transformer import Transformer
from jaxspd.convert.checkpoint import Checkpoint
from jaxspd.families import family_class, open_family
from jaxspd.hub import fetch
from jaxspd.planning import plan_request
from jaxspd.request import SamplingParams
from jaxspd.resolving import resolve
from jaxspd.runtime.residency import Residency
from jaxspd.sampling.noise import stage_noises
from tests import tiny
from tests.compare import relative
from tests.test_hub import hub  # noqa: F401
from torch_ref.wan import WanReference

BOUNDARY = 0.8
REQUEST = {
    "prompt": "a lake",
    "negative_prompt": "blur",
    "height": 64,
    "width": 96,
    "num_frames": 5,
    "num_inference_steps": 10,
    "guidance_scale": 4.0,
    "guidance_scale_2": 2.0,
}
SPECTRUM = {"amplitude": 2.0, "exponent": 3.0}
GROWN = {"progressive_mode": "dct_rewind", "progressive_delta": 0.05, "progressive_noise": "fresh"}
GROWN |= {"spectrum": SPECTRUM, "num_inference_steps": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_wan(tmp_path_factory.mktemp("wan22") / "model", num_layers=1, boundary_ratio=BOUNDARY)


@pytest.fixture(scope="module")
def generator(folder):
    return DiffGenerator.from_pretrained(folder, compilation_cache=False)


def make(generator, **changes):
    return generator.generate({**REQUEST, **changes}, save_output=False, show_progress=False)


def test_a_video_is_the_official_pipelines(generator, folder):
    ours = make(generator)
    pipeline = WanPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    asked = {name: REQUEST[name] for name in ("negative_prompt", "height", "width", "num_frames")}
    asked |= {name: REQUEST[name] for name in ("num_inference_steps", "guidance_scale", "guidance_scale_2")}
    latents = torch.from_numpy(stage_noises([42], (4, 2), [(8, 12)])[0])
    length = generator.family.text_tokens
    theirs = pipeline(
        REQUEST["prompt"], **asked, latents=latents, max_sequence_length=length, output_type="np"
    ).frames
    assert np.abs(ours.frames[0] / 255 - theirs[0]).max() <= 1 / 255
    assert ours.resident["transformer_2"] == ours.resident["transformer"] == "host"
    [second] = [stage["second"] for stage in ours.plan["stages"]]
    times = pipeline.scheduler.timesteps.tolist()
    assert second == [step for step, time in enumerate(times) if time < 1000 * BOUNDARY]
    assert 0 < len(second) < 10


def test_it_grows_as_the_reference_does(generator, folder, monkeypatch):
    params = SamplingParams(**{**REQUEST, **GROWN})
    plan = plan_request(generator.family, params)
    # The coarse grid ends with the second's turn, and the fine one begins with the first's.
    assert [sorted(stage.second) for stage in plan.stages] == [[6], [8, 9, 10, 11]]
    assert plan.stages[1].start == 7
    clean = []
    monkeypatch.setattr(
        generator._components,
        "decode",
        lambda latents: clean.append(latents) or np.zeros((1, 5, 64, 96, 3), np.uint8),
    )
    make(generator, **GROWN)
    reference = WanReference.from_pretrained(folder)
    noises = stage_noises([42], (4, 2), [stage.latent for stage in plan.stages])
    theirs = reference.denoise(
        noises,
        *reference.encode([REQUEST["prompt"]], [REQUEST["negative_prompt"]]),
        num_inference_steps=12,
        guidance_scale=4.0,
        guidance_scale_2=2.0,
        mode="dct_rewind",
        levels=1,
        delta=0.05,
        spectrum=tuple(SPECTRUM.values()),
    )
    assert relative(clean[0][0], theirs.numpy()[0]) <= 1e-4


def test_where_memory_is_short_only_one_stays_and_the_video_is_the_same(generator, folder, monkeypatch):
    expected = make(generator).frames[0]
    monkeypatch.setattr(Residency, "has_room", lambda self, size: False)
    monkeypatch.setattr(Residency, "has_host_room", lambda self, size: False)
    held, own = [], Transformer.load

    def load(self):
        loading = own(self)
        held.append([one.part for one in scarce._denoiser._transformers if one.loaded])
        return loading

    monkeypatch.setattr(Transformer, "load", load)
    scarce = DiffGenerator.from_pretrained(folder, compilation_cache=False)
    # Its programs are there already.
    scarce._denoiser._programs = generator._denoiser._programs
    for _ in range(2):
        np.testing.assert_array_equal(make(scarce).frames[0], expected)
    assert all(len(parts) == 1 for parts in held)
    assert {part for parts in held for part in parts} == {"transformer", "transformer_2"}


def test_the_next_is_read_into_the_hosts_memory_meanwhile(folder, monkeypatch):
    monkeypatch.setattr(Residency, "has_room", lambda self, size: False)
    monkeypatch.setattr(Residency, "has_host_room", lambda self, size: True)
    monkeypatch.setattr(Transformer, "place", "device")
    denoiser = DiffGenerator.from_pretrained(folder, compilation_cache=False)._denoiser
    first, second = denoiser._transformers
    for number, working, waiting in ((0, first, second), (1, second, first), (0, first, second)):
        weights = denoiser.turns.take(number)
        assert working.loaded
        assert not waiting.loaded
        ahead = waiting._ahead.result()
        assert isinstance(ahead["blocks"][0]["mlp"]["linear_1"]["weight"].get_value(), np.ndarray)
        stored = Checkpoint(folder / working.part).read("blocks.0.ffn.net.0.proj.weight")
        np.testing.assert_array_equal(weights["blocks"][0]["mlp"]["linear_1"]["weight"], stored)


def test_the_plan_tells_whose_each_step_is(folder, capsys):
    flags = ["--model-path", str(folder), "--height", "64", "--width", "96", "--num-inference-steps", "10"]
    flags += ["--progressive-mode", "dct_rewind", "--progressive-delta", "0.6"]
    assert main(["plan", *flags]) == 0
    assert "steps of the two transformers: first 0–" in capsys.readouterr().out
    assert main(["plan", "--json", *flags]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert stages[1]["second"] == list(range(stages[1]["second"][0], 10))


def test_a_finer_grid_may_give_the_first_another_turn():
    """Where the noise level rises above the boundary again, as it does when the grid grows close below it."""
    family = replace(family_class("wan")(), boundary=0.875)
    params = SamplingParams(progressive_mode="dct_rewind", progressive_sigmas=[0.86], num_inference_steps=40)
    coarse, fine = plan_request(family, params).stages
    assert coarse.second
    assert fine.start not in fine.second
    assert fine.end - 1 in fine.second


def test_what_is_not_asked_for_is_as_on_the_card():
    family = replace(family_class("wan")(), boundary=0.875)
    request = resolve(family, SamplingParams(prompt="a"))
    assert (request.num_inference_steps, request.height, request.width) == (40, 720, 1280)
    assert (request.guidance_scale, request.guidance_scale_2) == (4.0, 3.0)
    # As in the official pipeline, one that is given is both's.
    request = resolve(family, SamplingParams(prompt="a", guidance_scale=6.0))
    assert (request.guidance_scale, request.guidance_scale_2) == (6.0, 6.0)


def test_each_has_loras_of_its_own(folder, generator, tmp_path):
    shape = Checkpoint(folder / "transformer").shape("blocks.0.attn1.to_q.weight")
    name = "diffusion_model.blocks.0.self_attn.q"
    save_file({f"{name}.diff": np.ones(shape, np.float32)}, tmp_path / "low.safetensors")
    generator.set_loras(lora_path_2=tmp_path / "low.safetensors", lora_scale_2=0.5)
    request = generator.iterate({**REQUEST, "prompt": ["a"]}, save_output=False)
    assert generator.source.report["lora_path_2"] == [str(tmp_path / "low.safetensors")]
    request.close()
    for number, added in ((0, 0), (1, 0.5)):
        part = generator._denoiser._transformers[number].part
        stored = Checkpoint(folder / part).read("blocks.0.attn1.to_q.weight")
        weights = generator._denoiser.turns.take(number)
        found = weights["blocks"][0]["self_attention"]["q"]["weight"]
        np.testing.assert_allclose(found, stored + added, atol=1e-6)
    generator.set_loras()


def test_another_models_options_are_refused(refused, wan_folder, tmp_path):
    assert "has one transformer" in refused("--guidance-scale-2", "3", model=wan_folder)
    (tmp_path / "low.safetensors").touch()
    with pytest.raises(UsageError, match="has one transformer; leave lora_path_2 out"):
        DiffGenerator.from_pretrained(wan_folder, lora_path_2=tmp_path / "low.safetensors")


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("transformer_2/config.json", {"ffn_dim": 41}, "config.json of transformer and transformer_2 differ"),
        ("model_index.json", {"boundary_ratio": 1.5}, "boundary_ratio"),
        ("model_index.json", {"boundary_ratio": None}, "boundary_ratio"),
    ],
)
def test_two_that_do_not_belong_together(refused, tmp_path, file, change, says):
    broken = tiny.write_wan(tmp_path / "model", num_layers=1, boundary_ratio=BOUNDARY)
    tiny.common.change_json(broken / file, **change)
    assert says in refused(model=broken)


def test_both_come_from_the_hub(hub, folder):  # noqa: F811
    hub.add("maker/wan22", folder)
    family = fetch("maker/wan22")
    assert family == replace(open_family(folder), folder=family.folder)
    for part in family.transformers:
        assert Checkpoint(family.folder / part).keys() == Checkpoint(folder / part).keys()
