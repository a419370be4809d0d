"""Looks at an output while it is made: what they show, that they change nothing, and `--preview`."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxspd import DiffGenerator
from jaxspd.cli import main
from jaxspd.components.preview import fit
from jaxspd.media.growth import LOOKS, STRIP_HEIGHT, Growth
from jaxspd.media.metadata import read_request
from jaxspd.sampling.loop import Step

SMALL = {"height": 64, "width": 96, "num_inference_steps": 6, "seed": 5}
GROW = {"progressive_mode": "dct_rewind", "progressive_delta": 0.6}


def decibels(error):
    return 10 * np.log10(255**2 / np.mean(np.square(error)))


def test_an_euler_step_points_at_the_models_own_prediction():
    draw = np.random.default_rng(0)
    before, velocity = draw.standard_normal((2, 1, 4, 6, 8), dtype=np.float32)
    for sigma, reached in [(1.0, 0.9), (0.5, 0.2), (0.3, 0.0)]:
        step = Step(0, 0, sigma, reached, jnp.asarray(before), before + (reached - sigma) * velocity)
        np.testing.assert_allclose(step.clean(), before - sigma * velocity, rtol=0, atol=5e-6)
    still = Step(0, 0, 0.5, 0.5, jnp.asarray(before), before)
    np.testing.assert_array_equal(still.clean(), before)


@pytest.mark.parametrize("video", [False, True])
def test_the_map_of_a_linear_vae_is_found(video):
    mix, patch = np.random.default_rng(1).uniform(0.5, 2, (3, 3)) + np.eye(3), 4

    def encode(pixels):
        colours = pixels[:, 0].reshape(1, 32, patch, 32, patch, 3).mean((2, 4)) / 255 - 0.5
        latents = np.moveaxis(colours @ mix, -1, 1).astype(np.float32)
        return latents[:, :, None] if video else latents

    def decode(latents):
        latents = latents[:, :, 0] if video else latents
        colours = (np.moveaxis(latents, 1, -1) @ np.linalg.inv(mix) + 0.5) * 255
        pixels = np.rint(np.clip(colours, 0, 255)).astype(np.uint8)
        return pixels.repeat(patch, 1).repeat(patch, 2)[:, None]

    preview = fit(encode, decode, patch)
    picture = np.random.default_rng(2).integers(0, 256, (1, 1, 32 * patch, 32 * patch, 3), np.uint8)
    seen, wanted = preview(encode(picture)), decode(encode(picture))[0, :, ::patch, ::patch]
    assert seen.shape == (1, 32, 32, 3)
    assert np.abs(seen.astype(int) - wanted).max() <= 1


def test_looks_change_nothing_and_show_each_grid(flux1_folder):
    generator, seen = DiffGenerator.from_pretrained(flux1_folder, compilation_cache=False), []
    request = {"prompt": "a lake", **SMALL, **GROW}
    options = {"save_output": False, "show_progress": False}
    (plain,) = generator.iterate(request, **options)
    watched = generator.iterate(request, watch=lambda p: seen.append((p.grid, p.preview())), **options)
    np.testing.assert_array_equal(next(watched).frames, plain.frames)
    assert [look.shape for _, look in seen] == [(1, *grid, 3) for grid, _ in seen]
    assert {grid for grid, _ in seen} == {(4, 6), (8, 12)}
    assert len(seen) == 6
    assert seen[0][1].dtype == np.uint8


def test_who_watches_may_end_it(flux1_folder, tmp_path):
    generator, steps = DiffGenerator.from_pretrained(flux1_folder, compilation_cache=False), []

    def stop(progress):
        steps.append(progress.step.number)
        if len(steps) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        next(generator.iterate({"prompt": "a", "output_path": tmp_path, **SMALL}, watch=stop))
    assert steps == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []


def test_the_demos_looks_are_near_to_its_pictures():
    generator, looks = DiffGenerator.from_pretrained(), []
    prompts = [f"a serene mountain lake at {time}" for time in ("noon", "night")]
    request, error, flat = {"prompt": prompts, "num_inference_steps": 8}, [], []
    for output in generator.iterate(
        request, save_output=False, show_progress=False, watch=lambda p: looks.append(p.preview())
    ):
        height, width, _ = looks[-1][0].shape
        small = output.frames[0].reshape(height, 256 // height, width, 256 // width, 3).mean((1, 3))
        error.append(looks[-1][0] - small)
        flat.append(small - small.mean((0, 1)))
    # Of the last step, whose latents are the picture's own; 24.6 dB over sixteen pictures of 12 steps. The
    # mean colour alone is at 15.4.
    assert decibels(error) > 20
    assert decibels(error) > decibels(flat) + 5


def generate(folder, out, *flags):
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    where = ["--model-path", str(folder), "--output-path", str(out), "--output-file-name", "lake"]
    return main(["generate", *where, "--prompt", "a lake", *sizes, *flags])


def test_a_strip_shows_how_a_picture_grew(flux1_folder, tmp_path, capsys):
    grow = ["--progressive-mode", "dct_rewind", "--progressive-delta", "0.6", "--num-inference-steps", "12"]
    assert generate(flux1_folder, tmp_path, *grow, "--preview", "strip") == 0
    wrote = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrote ")]
    assert wrote == [f"wrote {tmp_path / name}" for name in ("lake.png", "lake.growth.png")]
    picture, strip = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("lake", "lake.growth"))
    looks = np.split(strip, LOOKS + 1, axis=1)
    np.testing.assert_array_equal(looks[-1], picture)
    # The first is the coarse grid's: squares of 16 pixels, each of one colour.
    squares = looks[0].reshape(4, 16, 6, 16, 3)
    assert (squares == squares[:, :1, :, :1]).all()
    assert not (looks[-2].reshape(4, 16, 6, 16, 3) == looks[-2].reshape(4, 16, 6, 16, 3)[:, :1, :, :1]).all()
    assert read_request(tmp_path / "lake.growth.png") == read_request(tmp_path / "lake.png")


def test_an_animation_of_a_videos_growth(wan_folder, tmp_path):
    assert generate(wan_folder, tmp_path, "--num-frames", "5", "--preview", "gif", "--json") == 0
    with Image.open(tmp_path / "lake.growth.gif") as animation:
        assert animation.size == (96, 64)
        assert animation.n_frames > 2
        assert json.loads(animation.info["comment"])["num_frames"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "lake.growth.gif",
        "lake.mp4",
        "lake.poster.png",
    ]


def test_a_large_pictures_strip_is_no_higher_than_a_strip(tmp_path):
    class Made:
        path, request = tmp_path / "a.png", {"prompt": "a"}
        frames = np.zeros((1, 1024, 512, 3), np.uint8)

    strip = Growth("strip").write(Made)
    assert Image.open(strip).size == (STRIP_HEIGHT // 2, STRIP_HEIGHT)


def test_previews_that_cannot_be_written(refused, flux1_folder, tmp_path, capsys):
    assert "unknown preview 'film'; use strip or gif" in refused("--preview", "film")
    (tmp_path / "out" / "lake.growth.png").mkdir(parents=True)
    assert generate(flux1_folder, tmp_path / "out", "--preview", "strip") == 2
    assert "lake.growth.png is a folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lake.growth.png"]
