"""The command as people run it: flags, files, reports."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from jaxspd.cli import main

SMALL = ["--height", "64", "--width", "96", "--num-inference-steps", "6"]


def generate(folder, out, *flags):
    return main(["generate", "--model-path", str(folder), "--output-path", str(out), *SMALL, *flags])


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_help_imports_neither_jax_nor_torch():
    code = (
        "import sys\n"
        "from jaxspd.cli import main\n"
        "try:\n    main(['generate', '--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'jax', 'torch', 'numpy', 'flax', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--progressive-delta" in done.stdout


def test_generate_writes_the_picture_asked_for(flux1_folder, tmp_path, capsys):
    flags = ["--prompt", "a lake", "--output-file-name", "lake", "--progressive-mode", "dct_rewind"]
    assert generate(flux1_folder, tmp_path, *flags, "--progressive-delta", "0.6") == 0
    assert pixels(tmp_path / "lake.png").shape == (64, 96, 3)
    captured = capsys.readouterr()
    for word in ("compile", "encode", "stage 1 (4×6)", "stage 2 (8×12)", "decode", "peak memory"):
        assert word in captured.out
    # The progress bar names stage, grid and σ.
    assert "stage 2/2 · 8×12 · σ 0.000" in captured.err


def test_json_reports_every_output(flux1_folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a lake\n\na meadow\n")
    flags = ["--prompt-path", str(prompts), "--num-outputs-per-prompt", "2", "--json", "--seed", "7"]
    assert generate(flux1_folder, tmp_path / "out", *flags) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(o["prompt"], o["seed"]) for o in report["outputs"]] == [
        ("a lake", 7),
        ("a lake", 8),
        ("a meadow", 7),
        ("a meadow", 8),
    ]
    assert report["programs"] == 1
    assert len(report["seconds"]["denoise"]) == len(report["plan"]["stages"]) == 1
    pictures = [pixels(o["path"]) for o in report["outputs"]]
    assert all((a != b).any() for i, a in enumerate(pictures) for b in pictures[:i])


def test_a_written_picture_repeats_itself(flux1_folder, tmp_path):
    flags = ["--prompt", "a lake", "--num-outputs-per-prompt", "2", "--output-file-name", "first.png"]
    assert generate(flux1_folder, tmp_path, *flags, "--guidance-scale", "2", "--seed", "3") == 0
    second = tmp_path / "first_1.png"
    again = ["--config", str(second), "--output-path", str(tmp_path), "--output-file-name", "again"]
    assert main(["generate", *again]) == 0
    assert (pixels(second) == pixels(tmp_path / "again.png")).all()


def test_a_picture_remembers_how_it_grew(flux1_folder, tmp_path):
    """Its spectrum too, whatever has become of the file."""
    spectrum = tmp_path / "spectrum.json"
    spectrum.write_text('{"amplitude": 20.0, "exponent": 3.0}')
    grown = [
        "--progressive-mode",
        "dct_rewind",
        "--progressive-transform",
        "fft",
        "--spectrum",
        str(spectrum),
    ]
    grown += [
        "--progressive-scales",
        "1/2",
        "1",
        "--progressive-respace",
        "true",
        "--progressive-shift",
        "stage",
    ]
    assert generate(flux1_folder, tmp_path, "--prompt", "a", *grown, "--output-file-name", "one") == 0
    spectrum.unlink()
    again = ["generate", "--config", str(tmp_path / "one.png"), "--output-path", str(tmp_path)]
    assert main([*again, "--output-file-name", "two"]) == 0
    assert (pixels(tmp_path / "one.png") == pixels(tmp_path / "two.png")).all()
    # A flag takes the place of what says the same in other words.
    flags = ["--progressive-levels", "1", "--progressive-sigmas", "0.5"]
    assert main([*again, "--output-file-name", "three", *flags]) == 0
    with Image.open(tmp_path / "three.png") as image:
        request = json.loads(image.info["jaxspd"])
    names = ("levels", "scales", "sigmas", "delta", "transform")
    values = [1, None, [0.5], None, "fft"]
    assert [request[f"progressive_{name}"] for name in names] == values
    assert (pixels(tmp_path / "one.png") != pixels(tmp_path / "three.png")).any()


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_config_file_holds_the_flags_and_flags_win(flux1_folder, tmp_path, suffix):
    values = {"model-path": str(flux1_folder), "prompt": "a lake", "height": 64, "width": 64}
    values |= {"num_inference_steps": 2, "seed": 5, "guidance-scale": 2}
    config = tmp_path / f"config.{suffix}"
    config.write_text(json.dumps(values))
    flags = ["--output-path", str(tmp_path), "--output-file-name", "c", "--width", "32"]
    assert main(["generate", "--config", str(config), *flags]) == 0
    with Image.open(tmp_path / "c.png") as image:
        assert image.size == (32, 64)
        request = json.loads(image.info["jaxspd"])
    assert (request["seed"], request["guidance_scale"], request["width"]) == (5, 2.0, 32)


def test_plan_prints_the_stages_of_flux1(capsys):
    flags = ["--num-inference-steps", "50", "--progressive-mode", "dct_rewind", "--progressive-delta", "0.05"]
    assert main(["plan", "--family", "flux1", *flags, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [plan[key] for key in ("family", "mode", "levels", "delta")] == ["flux1", "dct_rewind", 1, 0.05]
    assert [(s["latent"], s["tokens"], s["start"], s["end"]) for s in plan["stages"]] == [
        ([64, 64], 1024, 0, 28),
        ([128, 128], 4096, 28, 50),
    ]
    assert plan["stages"][1]["sigma"] == pytest.approx(0.712762, abs=1e-6)
    assert plan["stages"][1]["aligned_sigma"] == pytest.approx(0.832296, abs=1e-6)
    assert plan["token_step_ratio"] == pytest.approx((28 / 4 + 22) / 50)
    assert plan["flop_speedup"] == pytest.approx(1.66, abs=5e-3)
    assert main(["plan", "--family", "flux1", *flags]) == 0
    assert "0.832296" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("delta", "levels", "limit"), [("0.01", "1", 1.34), ("0.05", "1", 1.66), ("0.01", "2", 1.40)]
)
def test_plan_predicts_the_published_flop_limits(capsys, delta, levels, limit):
    flags = ["--progressive-mode", "dct_rewind", "--progressive-delta", delta]
    assert main(["plan", "--family", "flux1", *flags, "--progressive-levels", levels, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["flop_speedup"] == pytest.approx(limit, abs=5e-3)


def test_plan_reads_a_checkpoint_without_its_weights(schnell_folder, capsys):
    assert main(["plan", "--model-path", str(schnell_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["end"] == 4  # schnell's own default


def test_convert_writes_a_folder_that_generate_loads(flux1_folder, tmp_path, capsys):
    converted = tmp_path / "converted"
    assert main(["convert", "--model-path", str(flux1_folder), "--output-path", str(converted)]) == 0
    assert main(["convert", "--model-path", str(converted), "--output-path", str(tmp_path / "b")]) == 2
    assert "converted already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["converted"]
    assert generate(converted, tmp_path / "out", "--prompt", "a lake", "--output-file-name", "l") == 0
    assert generate(flux1_folder, tmp_path / "out", "--prompt", "a lake", "--output-file-name", "m") == 0
    assert (pixels(tmp_path / "out" / "l.png") == pixels(tmp_path / "out" / "m.png")).all()


def test_an_interrupt_leaves_no_file(flux1_folder, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "jaxspd", "generate", "--model-path", str(flux1_folder)]
    command += ["--prompt", "a lake", "--height", "64", "--width", "64", "--output-path", str(out)]
    command += ["--num-inference-steps", "1000000", "--compilation-cache", "false"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        # What a shell starts in the background ignores interrupts, and so does all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    seen, deadline = b"", time.monotonic() + 240
    while b"stage 1/1" not in seen and time.monotonic() < deadline:
        seen += os.read(process.stderr.fileno(), 4096)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest.decode()
    assert "interrupted" in rest.decode()
    assert not out.exists() or not list(out.iterdir())
