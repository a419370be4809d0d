"""The Python interface, compilation counts, offload, and converted checkpoints."""

import gc
import json
import shutil
import stat

import jax
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from jaxspd import DiffGenerator, UsageError
from jaxspd.convert.pipeline_folder import convert_pipeline
from jaxspd.families import open_family
from jaxspd.request import SamplingParams
from jaxspd.resolving import resolve
from jaxspd.runtime import cache
from tests.compare import relative
from tests.components import components

SMALL = {"height": 64, "width": 96, "num_inference_steps": 12, "progressive_delta": 0.6}


def make(generator, **values):
    request = {"prompt": "a lake", **SMALL, **values}
    return generator.generate(request, save_output=False, show_progress=False)


@pytest.fixture(scope="module")
def generator(flux1_folder):
    return DiffGenerator.from_pretrained(model_path=str(flux1_folder), compilation_cache=False)


@pytest.mark.parametrize("levels", [1, 2])
def test_each_resolution_compiles_once_and_never_again(flux1_folder, compiled, levels):
    generator = DiffGenerator.from_pretrained(model_path=str(flux1_folder), compilation_cache=False)
    size = {"height": 128, "width": 128, "progressive_levels": levels, "progressive_mode": "dct_rewind"}
    size |= {"num_inference_steps": 60}
    assert make(generator, **size).programs == levels + 1
    compiled.clear()
    other = {"prompt": "a wide green meadow at dawn", "seed": 9, "guidance_scale": 1.0}
    other |= {"num_inference_steps": 70, "progressive_delta": 0.7}
    assert make(generator, **{**size, **other}).programs == 0
    assert compiled == []
    # Another basis or spacing is another way from grid to grid, not another step.
    other |= {"progressive_transform": "dwt", "progressive_respace": True}
    assert make(generator, **{**size, **other}).programs == 0


def test_a_seed_gives_the_same_picture_whatever_is_beside_it(generator):
    alone = make(generator, seed=6).images[0]
    beside = make(generator, seed=5, num_outputs_per_prompt=2).images[1]
    assert (np.asarray(alone) == np.asarray(beside)).all()


@pytest.mark.parametrize("transform", ["dct", "fft", "dwt"])
def test_a_seed_is_the_same_picture_at_every_delta(transform):
    """With shared noise a progressive picture is full resolution's of the same seed; with fresh noise another
    one of the same prompt.
    """
    demo = DiffGenerator.from_pretrained()

    def picture(**settings):
        request = {"prompt": "a mountain lake at noon with snow", "seed": 3, "num_inference_steps": 16}
        made = demo.generate({**request, **settings}, save_output=False, show_progress=False)
        return np.asarray(made.images[0], np.float32)

    def psnr(one, other):
        return 10 * np.log10(255**2 / ((one - other) ** 2).mean())

    whole = picture()
    assert (picture(progressive_noise="fresh") == whole).all()
    growing = {"progressive_mode": "dct_rewind", "progressive_transform": transform}
    early, late = (picture(**growing, progressive_delta=delta) for delta in (0.2, 0.05))
    fresh = picture(**growing, progressive_delta=0.05, progressive_noise="fresh")
    assert min(psnr(early, whole), psnr(late, whole), psnr(early, late)) > psnr(fresh, whole) + 5


def test_full_resolution_equals_the_official_pipeline(generator, flux1_folder):
    """From prompt to pixels, with the pipeline's own encoders, loop and decoder."""
    result = make(generator, prompt="a wide lake", guidance_scale=2.5)
    pipeline = FluxPipeline.from_pretrained(flux1_folder, local_files_only=True)
    from jaxspd.sampling.noise import stage_noises

    noise = torch.from_numpy(stage_noises([42], (4,), [(8, 12)])[0])
    theirs = pipeline(
        "a wide lake",
        height=64,
        width=96,
        num_inference_steps=12,
        guidance_scale=2.5,
        latents=pipeline._pack_latents(noise, 1, 4, 8, 12),
        max_sequence_length=generator.family.text_tokens,
        output_type="np",
    ).images
    ours = np.asarray(result.images[0]) / 255
    assert np.abs(ours - theirs[0]).max() <= 1 / 255


def test_offloaded_weights_give_the_same_picture(generator, flux1_folder):
    offloaded = DiffGenerator.from_pretrained(model_path=str(flux1_folder), dit_cpu_offload=True)
    assert (np.asarray(make(offloaded).images[0]) == np.asarray(make(generator).images[0])).all()


def test_a_converted_checkpoint_gives_the_same_picture(generator, flux1_folder, tmp_path):
    convert_pipeline(open_family(flux1_folder), tmp_path / "converted")
    assert not list((tmp_path / "converted" / "transformer").glob("*.safetensors"))
    converted = DiffGenerator.from_pretrained(model_path=str(tmp_path / "converted"))
    assert (np.asarray(make(converted).images[0]) == np.asarray(make(generator).images[0])).all()


def test_conversion_overwrites_nothing(flux1_folder, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        convert_pipeline(open_family(flux1_folder), tmp_path / "there")


# Orbax's own reader threads complain once more when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_converted_checkpoint_that_does_not_fit_is_refused(flux1_folder, tmp_path):
    convert_pipeline(open_family(flux1_folder), tmp_path / "converted")
    config = tmp_path / "converted" / "transformer" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "num_layers": values["num_layers"] + 1}))
    with pytest.raises(UsageError, match="convert it again"):
        make(DiffGenerator.from_pretrained(model_path=str(tmp_path / "converted")))
    gc.collect()


def test_text_is_encoded_as_the_official_pipeline_does(flux1_folder):
    family = open_family(flux1_folder)
    prompts = ["a lake", "a wide green meadow under the midday sun " * 20]
    ours = components(family).encode_text(prompts)
    pipeline = FluxPipeline.from_pretrained(flux1_folder, transformer=None, vae=None, local_files_only=True)
    text, pooled, _ = pipeline.encode_prompt(prompts, None, max_sequence_length=family.text_tokens)
    assert relative(ours["text"], text.detach().numpy()) <= 1e-5
    assert relative(ours["pooled"], pooled.detach().numpy()) <= 1e-5


def test_the_compilation_cache_is_readable_by_its_owner_only(tmp_path, monkeypatch):
    monkeypatch.setattr(cache.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        folder = cache.enable_compilation_cache()
        assert folder == tmp_path / "jaxspd" / "xla"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert jax.config.jax_compilation_cache_dir == str(folder)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
    ("name", "steps", "guidance"),
    [("FLUX.1-Krea-dev", 28, 4.5), ("flux1-krea", 28, 4.5), ("FLUX.1-dev", 50, 3.5)],
)
def test_krea_is_known_by_its_name(flux1_folder, tmp_path, caplog, name, steps, guidance):
    """Its files are like [dev]'s."""
    family = open_family(shutil.copytree(flux1_folder, tmp_path / name))
    params = resolve(family, SamplingParams(prompt="a", height=64, width=64))
    assert (params.num_inference_steps, params.guidance_scale) == (steps, guidance)
    assert ("by its name this is FLUX.1-Krea" in caplog.text) == (steps == 28)
