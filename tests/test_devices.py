"""Programs made for cards that are not there: what is compiled again, the table, and a TPU's compiler."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import device_models
import device_report
import device_worker
import devices
import pytest
from machine import environment
from presets import Model, size

# Heads as wide as the kernels of accelerators want them.
SMALL = Model(
    "small",
    "flux1",
    size(128, 128, 4),
    (),
    {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1},
)


@pytest.fixture
def asked(monkeypatch):
    """The programs that `devices.main` has compiled, of one model; nothing is."""
    names = []

    def ask(card, model, wanted):
        for program, digest in wanted.items():
            names.append(program)
            yield program, {"digest": digest, "bytes": 2e9, "weights": 1e9, "layers": 3, "fused_layers": 2}

    monkeypatch.setattr(devices, "ask", ask)
    monkeypatch.setattr(devices, "MODELS", (SMALL,))
    monkeypatch.setattr(device_report, "MODELS", (SMALL,))
    return names


def test_only_what_changed_is_compiled_again(asked, tmp_path, monkeypatch):
    whole = [program.name for program in device_models.Published(SMALL).programs]
    assert whole[:2] == ["encode text_encoder", "encode text_encoder_2"]
    assert whole[2:] == ["denoise 8×8", "denoise 16×16", "decode 16×16"]
    for _ in range(2):
        assert devices.main(["--card", "h100"], tmp_path) == 0
    assert asked == whole
    monkeypatch.setitem(device_models.CODE, "decode", ("models/vae/coder.py",))
    assert devices.main(["--card", "h100"], tmp_path) == 0
    assert asked == [*whole, "decode 16×16"]
    [row] = [line for line in (tmp_path / "devices.md").read_text().splitlines() if "small" in line]
    # In all it takes the weights and what is decoded.
    assert row.startswith("| small | 1.00 | 2.00 | 2.00/2.00 | 2.00 | 3.00 | 2 of 3 |")


def test_of_a_model_in_8_bits_only_the_steps_are_compiled(asked, tmp_path, monkeypatch):
    both = SMALL, replace(SMALL, name="small in int8", quantize="int8")
    monkeypatch.setattr(devices, "MODELS", both)
    monkeypatch.setattr(device_report, "MODELS", both)
    assert devices.main(["--card", "h100"], tmp_path) == 0
    assert asked[-3:] == ["decode 16×16", "denoise 8×8", "denoise 16×16"]
    [_, row] = [line for line in (tmp_path / "devices.md").read_text().splitlines() if "small" in line]
    # Its text encoder and VAE are the whole model's.
    assert row.startswith("| small in int8 | 1.00 | 2.00 | 2.00/2.00 | 2.00 | 3.00 |")


def test_comments_are_no_change(tmp_path):
    texts = (
        'def f(x):\n    """Doc."""\n    return x  # same',
        "def f(x):\n    return x",
        "def f(x):\n    return 2",
    )
    meanings = []
    for number, text in enumerate(texts):
        (file := tmp_path / f"{number}.py").write_text(text)
        meanings.append(device_models.meaning(file))
    assert meanings[0].replace("Pass(), ", "") == meanings[1] != meanings[2]


def test_a_step_is_measured():
    published = device_models.Published(SMALL)
    *_, coarse, _, _ = published.programs
    found = device_worker.answer(published, coarse, device_worker.target_of("cpu"))
    assert found["layers"] == 2
    assert found["fused_layers"] == 0  # a CPU has none
    assert 0 < found["weights"] < found["bytes"]
    assert found["flops"] == published.family.forward_flops(16)


def test_a_tpu_compiles_fused_attention():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs TPU's compiler: pip install libtpu")
    code = (
        "import json, device_worker as w, device_models as m, test_devices as t\n"
        "p = m.Published(t.SMALL)\n"
        "print(json.dumps(w.answer(p, p.programs[-2], w.target_of('v6e'))))"
    )
    root = Path(__file__).parents[1]
    folders = ":".join([environment()["PYTHONPATH"], str(root / "bench"), str(root / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment() | devices.ENVIRONMENT | {"PYTHONPATH": folders},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "already in use" in done.stderr or "libtpu_lockfile" in done.stderr:
        pytest.skip("another process has TPU's compiler")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["fused_layers"] == found["layers"] == 2
    assert found["cycles"] > 0
