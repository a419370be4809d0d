"""Pictures of Z-Image from prompt to pixels: official result, text, compilation, bad input."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from PIL import Image

from jaxspd import DiffGenerator
from jaxspd.cli import main
from jaxspd.families import family_class, open_family
from jaxspd.media.metadata import read_request
from jaxspd.planning import plan_request
from jaxspd.request import SamplingParams
from jaxspd.resolving import resolve
from jaxspd.sampling.noise import stage_noises
from tests import tiny
from tests.compare import relative
from tests.components import components

SMALL = {"height": 64, "width": 96}


@pytest.fixture(scope="module")
def generators(z_image_folder, z_image_turbo_folder):
    return {
        name: DiffGenerator.from_pretrained(model_path=str(folder), compilation_cache=False)
        for name, folder in (("base", z_image_folder), ("turbo", z_image_turbo_folder))
    }


def make(generator, **values):
    return generator.generate({"prompt": "a lake", **SMALL, **values}, save_output=False, show_progress=False)


def official(folder):
    pipeline = ZImagePipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# The method's published numbers, and the model cards'


@pytest.mark.parametrize(
    ("delta", "split", "limit"), [(0.01, [26, 24], 1.62), (0.05, [35, 15], 2.07), (0.10, [39, 11], 2.36)]
)
def test_published_splits_and_flop_limits(delta, split, limit):
    family = family_class("z_image")()
    params = {"progressive_mode": "dct_rewind", "progressive_delta": delta, "num_inference_steps": 50}
    params |= {"noise_levels": "scheduler"}
    plan = plan_request(family, SamplingParams(height=1024, width=1024, **params))
    assert [stage.latent for stage in plan.stages] == [(64, 64), (128, 128)]
    assert [stage.steps for stage in plan.stages] == split
    # The published limits count a prompt of 256 tokens; ours run with all 512, padding included.
    assert plan.flop_speedup(replace(family, text_tokens=256).forward_flops) == pytest.approx(
        limit, abs=0.005
    )
    assert plan.flop_speedup(family.forward_flops) < limit


@pytest.mark.parametrize(("delta", "split"), [(0.01, [26, 24]), (0.05, [36, 14]), (0.10, [39, 11])])
def test_splits_on_the_authors_noise_levels(delta, split):
    params = {"progressive_mode": "dct_rewind", "progressive_delta": delta, "num_inference_steps": 50}
    plan = plan_request(family_class("z_image")(), SamplingParams(height=1024, width=1024, **params))
    assert [stage.steps for stage in plan.stages] == split


def test_defaults_are_the_model_cards(z_image_turbo_folder):
    base = resolve(family_class("z_image")(), SamplingParams(prompt="a"))
    assert (base.num_inference_steps, base.guidance_scale, base.negative_prompt) == (50, 4.0, "")
    turbo = resolve(open_family(z_image_turbo_folder), SamplingParams(prompt="a"))
    # The card says that its 9 steps are 8 forwards.
    assert (turbo.num_inference_steps, turbo.guidance_scale) == (8, 0.0)
    assert base.noise_levels == turbo.noise_levels == "official"
    assert base.scheduler == turbo.scheduler == "euler"
    assert (base.height, base.width) == (1280, 720)
    assert (turbo.height, turbo.width) == (1024, 1024)


def test_the_default_size_is_rounded_down_where_it_cannot_be_halved():
    family = family_class("z_image")()
    for mode, grids in (("fullres", [(160, 90)]), ("dct_rewind", [(80, 44), (160, 88)])):
        params = resolve(family, SamplingParams(prompt="a", progressive_mode=mode))
        assert [stage.latent for stage in plan_request(family, params).stages] == grids


@pytest.mark.parametrize("shift", [None, 2.0])
def test_noise_levels_are_the_authors_or_the_schedulers(z_image_folder, shift):
    family, steps = open_family(z_image_folder), 9
    s, t = shift or 6.0, np.linspace(1, 0, steps + 1)
    official = s * t / (1 + (s - 1) * t)
    np.testing.assert_allclose(family.sigmas(steps, 24, shift), official, rtol=0, atol=1e-6)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=s)
    scheduler.set_timesteps(steps)
    ours = family.sigmas(steps, 24, shift, "scheduler")
    np.testing.assert_allclose(ours, scheduler.sigmas, rtol=0, atol=1e-6)
    assert np.abs(ours - official).max() > 0.01


# The official pipeline


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("base", {}),
        ("base", {"guidance_scale": 1.0, "negative_prompt": "haze"}),
        ("base", {"guidance_scale": 0.0}),
        ("base", {"noise_levels": "scheduler"}),
        ("turbo", {}),
    ],
    ids=["defaults", "scale 1", "unguided", "scheduler's levels", "turbo"],
)
def test_full_resolution_equals_the_official_pipeline(generators, name, options):
    generator = generators[name]
    family, steps = generator.family, generator.family.default_steps if name == "turbo" else 9
    ours = make(generator, prompt="a wide lake", num_inference_steps=steps, **options).frames[0]
    pipeline, sigmas = official(family.folder), None
    if options.get("noise_levels") == "scheduler":
        # The scheduler's own, before it shifts them.
        sigmas = np.linspace(1, pipeline.scheduler.sigma_min, steps).tolist()
    theirs = pipeline(
        "a wide lake",
        negative_prompt=options.get("negative_prompt"),
        guidance_scale=options.get("guidance_scale", family.default_guidance),
        **SMALL,
        num_inference_steps=steps,
        sigmas=sigmas,
        latents=torch.from_numpy(stage_noises([42], (4,), [(8, 12)])[0]),
        output_type="np",
    ).images
    assert np.abs(ours / 255 - theirs).max() <= 1 / 255
    # Neither black nor white, where anything would be equal.
    assert np.mean((theirs > 0.01) & (theirs < 0.99)) > 0.5


def test_text_is_encoded_as_the_official_pipeline_does(z_image_folder):
    family, prompts = open_family(z_image_folder), ["a lake", "", "<b>wide</b>\n meadow " * 60]
    ours, pipeline = components(family).encode_text(prompts), official(z_image_folder)
    assert ours["text"].shape == (3, 512, 20)
    for prompt, text, length in zip(prompts, ours["text"], ours["lengths"], strict=True):
        with torch.no_grad():
            theirs = pipeline.encode_prompt([prompt], do_classifier_free_guidance=False)[0][0].numpy()
        assert length == len(theirs)
        assert relative(text[:length], theirs) <= 1e-5
        assert (text[length:] == 0).all()
    assert ours["lengths"].dtype == np.int32
    assert ours["lengths"].tolist()[2] == 512  # cut, as there


def test_decoding_is_the_official_one(z_image_folder):
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 12), dtype=np.float32)
    pipeline = official(z_image_folder)
    with torch.no_grad():
        scaled = torch.from_numpy(latents) / pipeline.vae.config.scaling_factor
        theirs = pipeline.vae.decode(scaled + pipeline.vae.config.shift_factor).sample.numpy()
    expected = np.clip(theirs.transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1)
    pictures = components(z_image_folder).decode(latents)
    assert pictures.shape == (2, 1, 64, 96, 3)
    # Nothing but rounding to 256 levels between them.
    assert np.abs(pictures[:, 0] / 255 - expected).max() <= 0.5 / 255 + 1e-4


def test_a_picture_remembers_its_noise_levels(z_image_turbo_folder, tmp_path):
    flags = ["--height", "64", "--width", "64", "--num-inference-steps", "3", "--output-path", str(tmp_path)]
    first = ["--model-path", str(z_image_turbo_folder), "--prompt", "a lake", "--noise-levels", "scheduler"]
    assert main(["generate", *first, *flags, "--output-file-name", "first.png"]) == 0
    assert read_request(tmp_path / "first.png")["noise_levels"] == "scheduler"
    again = ["generate", "--config", str(tmp_path / "first.png"), "--output-path", str(tmp_path)]
    assert main([*again, "--output-file-name", "again.png"]) == 0
    assert main([*again, "--output-file-name", "other.png", "--noise-levels", "official"]) == 0
    one, two, three = (
        np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("first", "again", "other")
    )
    np.testing.assert_array_equal(one, two)
    assert (one != three).any()


def test_the_plan_tells_noise_levels_apart(capsys):
    common = ["plan", "--family", "z_image", "--num-inference-steps", "50", "--height", "1024"]
    common += ["--width", "1024", "--progressive-mode", "dct_rewind", "--progressive-delta", "0.05", "--json"]
    ends = []
    for kind in ("official", "scheduler"):
        assert main([*common, "--noise-levels", kind]) == 0
        ends.append(json.loads(capsys.readouterr().out)["stages"][0]["end"])
    assert ends == [36, 35]
    assert main(["plan", "--family", "wan", "--noise-levels", "official"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# Compilation


def test_no_prompt_length_compiles_anything(z_image_folder, compiled):
    generator = DiffGenerator.from_pretrained(model_path=str(z_image_folder), compilation_cache=False)
    settings = {"progressive_mode": "dct_rewind", "progressive_delta": 0.6, "num_inference_steps": 12}
    settings |= {"height": 128, "width": 192}
    assert make(generator, prompt="a wide lake", **settings).programs == 2
    compiled.clear()
    assert make(generator, prompt="green hills " * 75, negative_prompt="haze", **settings).programs == 0
    assert compiled == []


def test_a_shorter_text_is_the_same_text(generators):
    """Padding is masked, so that less of it changes nothing, whatever it is a multiple of."""
    pictures = [
        make(generators["base"], num_inference_steps=2, max_sequence_length=length).frames[0].astype(int)
        for length in (None, 50, 2)
    ]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert np.abs(pictures[0] - pictures[2]).max() > 1


# Bad input


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"siglip_feat_dim": 24}, "siglip_feat_dim belongs to another model"),
        ({"all_patch_size": [2, 4], "all_f_patch_size": [1, 1]}, "all_patch_size, all_f_patch_size belong"),
        ({"in_channels": 16}, "do not belong together"),
    ],
)
def test_a_checkpoint_of_another_kind(refused, tmp_path, change, says):
    folder = tiny.write_z_image(tmp_path / "model")
    tiny.change_json(folder / "transformer" / "config.json", **change)
    assert says in refused(model=folder)


def test_a_scheduler_that_shifts_with_the_size(refused, tmp_path):
    folder = tiny.write_z_image(tmp_path / "model")
    tiny.change_json(folder / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True)
    assert "use_dynamic_shifting" in refused(model=folder)


def test_a_picture_too_small_for_its_levels(refused, z_image_folder):
    flags = ["--height", "64", "--width", "64", "--progressive-mode", "dct", "--progressive-levels", "3"]
    assert "use at most 2" in refused(*flags, model=z_image_folder)


def test_noise_levels_that_do_not_exist(refused, z_image_folder, flux1_folder):
    says = refused("--noise-levels", "karras", model=z_image_folder)
    assert "no noise levels 'karras'; use official or scheduler" in says
    for kind in ("official", "scheduler"):
        says = refused("--noise-levels", kind, model=flux1_folder)
        assert "FLUX.1 has no noise levels to choose from; leave --noise-levels out" in says


def test_frames_belong_to_videos(refused, z_image_folder):
    assert "makes pictures" in refused("--num-frames", "5", model=z_image_folder)
