"""The judge of FLUX.2, judged: against diffusers' own pipelines, scipy and published numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from einops import rearrange
from scipy.fft import dctn, idctn

from tests import tiny
from tests.compare import relative
from torch_ref import spectral
from torch_ref.flux2 import Flux2Reference, set_schedule

PROMPTS = ["a red house", "Blue hills, night"]
# Steep enough to give 4x6, 8x12 and 16x24 latents a share of a dozen steps each.
STEEP = (20.0, 3.0)
AXES = (-2, -1)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def open_reference(folder) -> Flux2Reference:
    reference = Flux2Reference.from_pretrained(folder)
    reference.pipeline.set_progress_bar_config(disable=True)
    return reference


@pytest.fixture(scope="module")
def klein_base(klein_base_folder) -> Flux2Reference:
    return open_reference(klein_base_folder)


@pytest.fixture(scope="module")
def dev(flux2_dev_folder) -> Flux2Reference:
    return open_reference(flux2_dev_folder)


@pytest.mark.parametrize(("delta", "split"), [(0.05, [18, 12]), (0.10, [20, 10])])
def test_published_splits_at_1024(delta, split):
    scheduler = tiny.flux2_scheduler()
    set_schedule(scheduler, 30, tokens=64 * 64)
    starts = spectral.stage_starts(scheduler.sigmas[:-1].tolist(), 64, 64, levels=1, delta=delta)
    assert np.diff([*starts, 30]).tolist() == split


@pytest.mark.parametrize("guidance", [1.0, 3.0], ids=["unguided", "guided"])
def test_full_resolution_loop_of_klein_is_the_pipelines(klein_base, guidance):
    latents, pipeline = noise(2, 16, 4, 6), klein_base.pipeline
    # The pipeline's own negative prompt is empty.
    negative = klein_base.encode([""] * 2) if guidance > 1 else None
    ours = klein_base.denoise(
        [latents], klein_base.encode(PROMPTS), negative, num_inference_steps=6, guidance_scale=guidance
    )
    arguments = {
        "prompt": PROMPTS,
        "height": 64,
        "width": 96,
        "num_inference_steps": 6,
        "guidance_scale": guidance,
        "latents": torch.from_numpy(latents),
    }
    # Its latents come out ready for the VAE's decoder: neither normalised nor patchified.
    theirs = pipeline(output_type="latent", **arguments).images
    statistics = pipeline.vae.bn
    scale = np.sqrt(statistics.running_var.numpy() + pipeline.vae.config.batch_norm_eps)
    scaled = ours.numpy() * scale[:, None, None] + statistics.running_mean.numpy()[:, None, None]
    unpatchified = rearrange(scaled, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)
    assert relative(unpatchified, theirs.numpy()) <= 1e-5
    images = pipeline(output_type="np", **arguments).images
    np.testing.assert_allclose(klein_base.decode(ours), images, rtol=0, atol=1e-4)


def test_full_resolution_loop_of_dev_is_the_pipelines(dev):
    latents = noise(2, 16, 4, 6)
    ours = dev.denoise([latents], dev.encode(PROMPTS), num_inference_steps=6, guidance_scale=2.5)
    arguments = {
        "prompt": PROMPTS,
        "height": 64,
        "width": 96,
        "num_inference_steps": 6,
        "guidance_scale": 2.5,
        "latents": torch.from_numpy(latents),
    }
    theirs = dev.pipeline(output_type="latent", **arguments).images
    assert relative(rearrange(ours.numpy(), "b c h w -> b (h w) c"), theirs.numpy()) <= 1e-5
    images = dev.pipeline(output_type="np", **arguments).images
    np.testing.assert_allclose(dev.decode(ours), images, rtol=0, atol=1e-4)


def test_guidance_is_embedded_by_dev_and_needs_a_negative_prompt_in_klein(klein_base, dev):
    latents = torch.from_numpy(noise(2, 16, 4, 4))
    for reference, embeds in ((klein_base, False), (dev, True)):
        text = reference.encode(PROMPTS)
        weak, strong = (reference.velocity(latents, 0.7, text, guidance_scale=g) for g in (1.0, 4.0))
        assert torch.equal(weak, strong) != embeds
    text, negative = klein_base.encode(PROMPTS), klein_base.encode([""] * 2)
    one, two, four = (klein_base.velocity(latents, 0.7, text, negative, g) for g in (1.0, 2.0, 4.0))
    assert relative(one, klein_base.velocity(latents, 0.7, text)) <= 1e-6
    assert relative(one + 3 * (two - one), four) <= 1e-5


def grown(latents: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    coarse = dctn(latents, axes=AXES, norm="ortho")
    coefficients[..., : coarse.shape[-2], : coarse.shape[-1]] = coarse
    return idctn(coefficients, axes=AXES, norm="ortho")


@pytest.mark.parametrize("grid", ["patchified", "latent"])
@pytest.mark.parametrize("mode", ["dct", "dct_rewind"])
def test_progressive_loop_follows_the_method_step_by_step(klein_base, mode, grid):
    noises = [noise(2, 16, side, side + side // 2, seed=side) for side in (4, 8, 16)]
    text, steps, delta = klein_base.encode(PROMPTS), 12, 0.05
    ours = klein_base.denoise(
        noises,
        text,
        num_inference_steps=steps,
        mode=mode,
        levels=2,
        delta=delta,
        spectrum=STEEP,
        grid=grid,
    )

    scheduler = tiny.flux2_scheduler()
    set_schedule(scheduler, steps, tokens=16 * 24)
    sigmas = scheduler.sigmas.tolist()
    starts = spectral.stage_starts(sigmas[:-1], 16, 24, levels=2, delta=delta, spectrum=STEEP)
    assert np.diff([*starts, steps]).min() > 0
    latents = noises[0]
    for i in range(steps):
        if i in starts[1:]:
            fresh = sigmas[i] * noises[starts.index(i)]
            if grid == "latent":
                latents, fresh = (
                    rearrange(part, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2) for part in (latents, fresh)
                )
            latents = grown(latents, fresh)
            if grid == "latent":
                latents = rearrange(latents, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)
            if mode == "dct_rewind":
                latents = latents * 2 / (1 + sigmas[i])
                sigmas[i] = 2 * sigmas[i] / (1 + sigmas[i])
        velocity = klein_base.velocity(torch.from_numpy(latents), sigmas[i], text).numpy()
        latents = latents + np.float32(sigmas[i + 1] - sigmas[i]) * velocity
    assert relative(ours, latents) <= 1e-5


def test_a_patchified_grid_may_be_odd(klein_base):
    noises = [noise(1, 16, 3, 5), noise(1, 16, 6, 10)]
    text = klein_base.encode(PROMPTS[:1])
    latents = klein_base.denoise(noises, text, num_inference_steps=12, mode="dct", delta=0.6, spectrum=STEEP)
    assert latents.shape == (1, 16, 6, 10)
    with pytest.raises(ValueError, match="one noise array is needed for each"):
        klein_base.denoise(noises[1:], text, num_inference_steps=12, mode="dct")


def test_tiny_checkpoint_can_be_sharded_and_stored_in_bfloat16(tmp_path):
    tiny.write_flux2(tmp_path, dtype=torch.bfloat16, shard_size="100KB")
    assert (tmp_path / "transformer/diffusion_pytorch_model.safetensors.index.json").exists()
    reference = Flux2Reference.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert reference.pipeline.transformer.dtype == torch.bfloat16
    velocity = reference.velocity(torch.zeros(2, 16, 4, 4), 0.5, reference.encode(PROMPTS))
    assert velocity.dtype == torch.float32
    assert velocity.isfinite().all()
