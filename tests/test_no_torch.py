"""PyTorch and what is built on it are the judge's alone: no command needs them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training import landscapes

ROOT = Path(__file__).parents[1]
BLOCKED = ("torch", "diffusers", "accelerate", "transformers")
# Runs one command after the other, in a process to which they do not exist.
SCRIPT = f"""
import importlib.abc, json, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
from jaxspd.cli import main
for command in json.load(sys.stdin):
    if code := main(command):
        sys.exit(code)
"""
SIZE = ["--height", "64", "--width", "64"]
ASK = ["--prompt", "a lake", "--num-inference-steps", "2", "--compilation-cache", "false", *SIZE]


def run(*commands: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(commands), cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("family", ["klein", "flux2_dev", "wan", "z_image", "qwen_image"])
def test_every_family_makes_a_picture(family, request, tmp_path):
    model = ["--model-path", str(request.getfixturevalue(f"{family}_folder"))]
    ask = [*ASK, "--num-frames", "1"] if family == "wan" else ASK
    run(["generate", *model, *ask, "--output-path", str(tmp_path), "--output-file-name", "lake.png"])
    assert np.asarray(Image.open(tmp_path / "lake.png")).std() > 1


def test_every_command_runs(flux1_folder, tmp_path):
    converted, images = tmp_path / "converted", tmp_path / "images"
    images.mkdir()
    for seed in range(2):
        Image.fromarray(landscapes.sample(seed, 128)[0]).save(images / f"{seed}.png")
    official = ["--model-path", str(flux1_folder)]
    grow = ["--progressive-mode", "dct", "--progressive-delta", "0.1", "--output-path", str(tmp_path)]
    run(
        ["plan", *official, *SIZE],
        ["convert", *official, "--output-path", str(converted)],
        ["generate", *official, *ASK, *grow, "--output-file-name", "official.png"],
        ["generate", "--model-path", str(converted), *ASK, *grow, "--output-file-name", "converted.png"],
        ["calibrate", *official, "--images", str(images), "--output-path", str(tmp_path / "s.json"), *SIZE],
    )
    first, second = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("official", "converted"))
    assert first.std() > 1
    np.testing.assert_array_equal(first, second)
    assert (tmp_path / "s.json").is_file()
