"""The embedded demo: what ships, what it was trained on, and that it draws what it is asked for."""

import json

import numpy as np
import pytest
from training.attributes import detect
from training.landscapes import GROUNDS, TIMES, Scene, caption, draw, parse, sample

from jaxspd import DiffGenerator
from jaxspd.families import open_family
from jaxspd.hub import DEMO


def test_the_checkpoint_is_small_and_complete():
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32e6
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pkl"}]
    family = open_family(DEMO)
    assert family.default_size == (256, 256)
    assert family.spectrum.amplitude == json.loads((DEMO / "spectrum.json").read_text())["amplitude"]


def test_drawings_depend_on_the_seed_alone():
    first, words, scene = sample(11)
    again = sample(11)
    assert (first == again[0]).all()
    assert (words, scene) == again[1:]
    assert (first != sample(12)[0]).any()


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("snow", [True, False])
def test_a_caption_says_what_the_picture_shows(time, ground, snow):
    scene = Scene(time, ground, snow)
    for seed in range(5):
        assert parse(caption(scene, np.random.default_rng(seed))) == scene


def test_the_check_finds_the_attributes_of_drawings():
    rng = np.random.default_rng(1)
    scenes = [Scene(t, g, s) for t in TIMES for g in GROUNDS for s in (True, False)]
    assert detect(np.stack([draw(scene, rng) for scene in scenes])) == scenes


@pytest.mark.parametrize("mode", ["fullres", "dct_rewind"])
def test_the_demo_draws_time_of_day_and_ground(mode):
    """Eight pictures, sixteen attributes; `bench/demo.py` counts over a hundred."""
    generator = DiffGenerator.from_pretrained()
    scenes = [Scene(time, ground, True) for time in TIMES for ground in GROUNDS]
    prompts = [f"a serene mountain {scene.ground} at {scene.time} with snow" for scene in scenes]
    request = {"prompt": prompts, "num_inference_steps": 28, "progressive_mode": mode}
    result = generator.generate(
        {**request, "progressive_delta": 0.05}, save_output=False, show_progress=False
    )
    found = detect(np.stack([np.asarray(image) for image in result.images]))
    right = [(f.time == s.time) + (f.ground == s.ground) for f, s in zip(found, scenes, strict=True)]
    assert sum(right) >= 14
