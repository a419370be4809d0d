"""The judge, judged: against scipy, diffusers' own pipeline and published numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn

from tests import tiny
from torch_ref import bases, spectral
from torch_ref.flux1 import Flux1Reference, set_schedule

PROMPTS = ["a red house", "Blue hills, night"]
TEXT_LENGTH = 24
# FLUX.1 at 1024 x 1024: latents 128 x 128, packed to 4096 tokens.
GRID, TOKENS, STEPS = 128, 4096, 50
# Steep enough to give 4 x 4, 8 x 8 and 16 x 16 latents a share of eight steps each: 1 + 2 + 5.
TINY_SPECTRUM = (20.0, 3.0)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture(scope="module", params=[False, True], ids=["dev", "schnell"])
def reference(request, tmp_path_factory) -> Flux1Reference:
    folder = tmp_path_factory.mktemp("flux1")
    tiny.write_flux1(folder, schnell=request.param, text_length=TEXT_LENGTH)
    reference = Flux1Reference.from_pretrained(folder)
    reference.pipeline.set_progress_bar_config(disable=True)
    return reference


@pytest.mark.parametrize(
    ("delta", "threshold", "sigma", "aligned", "starts"),
    [
        (0.05, 0.718037, 0.712762, 0.832296, [0, 28]),
        (0.01, 0.852663, 0.848818, 0.918228, [0, 18]),
    ],
)
def test_published_transition_at_1024(delta, threshold, sigma, aligned, starts):
    sigmas = set_schedule(tiny.flux1_scheduler(), STEPS, TOKENS)
    spectrum = spectral.FLUX1_SPECTRUM
    assert spectral.stage_starts(sigmas, GRID, GRID, levels=1, delta=delta) == starts
    assert spectral.activation_sigma(GRID // 4, delta, spectrum) == pytest.approx(threshold, abs=1e-6)
    at_transition = sigmas[starts[1]]
    assert at_transition == pytest.approx(sigma, abs=1e-6)
    assert spectral.kappa(at_transition) * at_transition == pytest.approx(aligned, abs=1e-6)


def test_published_split_with_two_levels():
    sigmas = set_schedule(tiny.flux1_scheduler(), STEPS, TOKENS)
    starts = spectral.stage_starts(sigmas, GRID, GRID, levels=2, delta=0.01)
    assert np.diff([*starts, STEPS]).tolist() == [10, 8, 32]


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1])
def test_delta_outside_its_range_is_refused(delta):
    with pytest.raises(ValueError, match="delta"):
        spectral.activation_sigma(32, delta, spectral.FLUX1_SPECTRUM)


def test_a_stage_without_a_step_is_refused():
    with pytest.raises(ValueError, match="stage 2 at 128x128 has no step"):
        spectral.stage_starts([1.0, 0.99], GRID, GRID, levels=1, delta=0.05)
    with pytest.raises(ValueError, match="stage 2 at 64x64 has no step"):
        spectral.stage_starts([1.0, 0.3], GRID, GRID, levels=2, delta=0.05)
    with pytest.raises(ValueError, match="stage 1 at 64x64 has no step"):
        spectral.stage_starts([0.3, 0.2], GRID, GRID, levels=1, delta=0.05)


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 2, 60, 104), (1, 1, 5, 8)])
def test_dct_is_scipys(shape):
    x = noise(*shape)
    there = bases.dct2(torch.from_numpy(x)).numpy()
    back = bases.idct2(torch.from_numpy(x)).numpy()
    x = x.astype(np.float64)
    np.testing.assert_allclose(there, dctn(x, axes=(-2, -1), norm="ortho"), rtol=0, atol=1e-6)
    np.testing.assert_allclose(back, idctn(x, axes=(-2, -1), norm="ortho"), rtol=0, atol=1e-6)


def test_expansion_keeps_low_coefficients_and_fills_the_rest_with_scaled_noise():
    x, fine, sigma = noise(1, 2, 6, 10), noise(1, 2, 12, 20, seed=1), 0.7
    expanded = spectral.expand(torch.from_numpy(x), torch.from_numpy(fine), sigma)
    coefficients = dctn(expanded.numpy(), axes=(-2, -1), norm="ortho")
    expected = sigma * fine
    expected[..., :6, :10] = dctn(x, axes=(-2, -1), norm="ortho")
    np.testing.assert_allclose(coefficients, expected, atol=2e-6)


def test_kappa_puts_the_expanded_signal_where_the_schedule_wants_it():
    sigma, clean = 0.7, 3.0
    x = torch.full((1, 1, 4, 4), (1 - sigma) * clean)
    factor = spectral.kappa(sigma)
    expanded = factor * spectral.expand(x, torch.zeros(1, 1, 8, 8), sigma)
    torch.testing.assert_close(expanded, torch.full((1, 1, 8, 8), (1 - factor * sigma) * clean))


def test_full_resolution_loop_is_the_pipelines(reference):
    latents, steps, guidance = noise(2, 4, 8, 12), 6, 2.5
    embeddings = reference.encode(PROMPTS)
    ours = reference.denoise([latents], *embeddings, num_inference_steps=steps, guidance_scale=guidance)

    pipeline = reference.pipeline
    packed = pipeline._pack_latents(torch.from_numpy(latents), *latents.shape)
    arguments = {
        "prompt": PROMPTS,
        "height": 64,
        "width": 96,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "latents": packed,
        "max_sequence_length": TEXT_LENGTH,
    }
    theirs = pipeline(output_type="latent", **arguments).images
    assert relative_error(ours, pipeline._unpack_latents(theirs, 64, 96, 8)) <= 1e-5
    images = pipeline(output_type="np", **arguments).images
    np.testing.assert_allclose(reference.decode(ours), images, atol=1e-4)


def test_guidance_matters_only_to_a_model_that_has_it(reference):
    latents = torch.from_numpy(noise(2, 4, 8, 8))
    embeddings = reference.encode(PROMPTS)
    weak, strong = (reference.velocity(latents, 0.7, *embeddings, scale) for scale in (1.0, 4.0))
    assert torch.equal(weak, strong) != reference.pipeline.transformer.config.guidance_embeds


@pytest.mark.parametrize("mode", ["dct", "dct_rewind"])
def test_progressive_loop_follows_the_method_step_by_step(reference, mode):
    noises = [noise(2, 4, side, side, seed=side) for side in (4, 8, 16)]
    embeddings = reference.encode(PROMPTS)
    steps, delta = 8, 0.05
    ours = reference.denoise(
        noises,
        *embeddings,
        num_inference_steps=steps,
        mode=mode,
        levels=2,
        delta=delta,
        spectrum=TINY_SPECTRUM,
    )

    sigmas = [*set_schedule(reference.pipeline.scheduler, steps, tokens=64), 0.0]
    starts = spectral.stage_starts(sigmas[:-1], 16, 16, levels=2, delta=delta, spectrum=TINY_SPECTRUM)
    assert starts == [0, 1, 3]
    latents = noises[0]
    for i in range(steps):
        if i in starts[1:]:
            coefficients = sigmas[i] * noises[starts.index(i)]
            coarse = dctn(latents, axes=(-2, -1), norm="ortho")
            coefficients[..., : coarse.shape[-2], : coarse.shape[-1]] = coarse
            latents = idctn(coefficients, axes=(-2, -1), norm="ortho")
            if mode == "dct_rewind":
                latents = latents * 2 / (1 + sigmas[i])
                sigmas[i] = 2 * sigmas[i] / (1 + sigmas[i])
        velocity = reference.velocity(torch.from_numpy(latents), sigmas[i], *embeddings).numpy()
        latents = latents + np.float32(sigmas[i + 1] - sigmas[i]) * velocity
    assert relative_error(ours, torch.from_numpy(latents)) <= 1e-5


def test_noise_that_does_not_fit_the_stages_is_refused(reference):
    embeddings = reference.encode(PROMPTS)
    with pytest.raises(ValueError, match="one noise array is needed for each"):
        reference.denoise([noise(2, 4, 8, 8)], *embeddings, num_inference_steps=4, mode="dct")
    odd = [noise(2, 4, 3, 3), noise(2, 4, 6, 6)]
    with pytest.raises(ValueError, match="even"):
        reference.denoise(odd, *embeddings, num_inference_steps=4, mode="dct")


def test_tiny_checkpoint_can_be_sharded_and_stored_in_bfloat16(tmp_path):
    tiny.write_flux1(tmp_path, dtype=torch.bfloat16, shard_size="300KB")
    assert (tmp_path / "transformer/diffusion_pytorch_model.safetensors.index.json").exists()
    reference = Flux1Reference.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert reference.pipeline.transformer.dtype == torch.bfloat16
    velocity = reference.velocity(torch.zeros(2, 4, 8, 8), 0.5, *reference.encode(PROMPTS))
    assert velocity.dtype == torch.float32
    assert velocity.isfinite().all()
