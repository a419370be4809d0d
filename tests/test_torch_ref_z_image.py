"""Z-Image's judge, judged: against diffusers' own pipeline, the method by hand, and published numbers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import safe_open
from scipy.fft import dctn, idctn

from tests import tiny
from tests.compare import relative
from torch_ref import spectral
from torch_ref.z_image import ZImageReference

PROMPTS, NEGATIVES = ["a red house", "Blue hills, night, " * 3], ["", "blurred"]
STEPS, DELTA, STEEP = 14, 0.05, (20.0, 3.0)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def own_steps(scheduler: FlowMatchEulerDiscreteScheduler, steps: int) -> FlowMatchEulerDiscreteScheduler:
    schedule = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    schedule.set_timesteps(steps)
    return schedule


@pytest.fixture(scope="module", params=[False, True], ids=["base", "turbo"])
def reference(request, tmp_path_factory) -> ZImageReference:
    folder = tiny.write_z_image(tmp_path_factory.mktemp("z_image"), turbo=request.param)
    reference = ZImageReference.from_pretrained(folder)
    reference.pipeline.set_progress_bar_config(disable=True)
    return reference


@pytest.mark.parametrize("scale", [0.0, 4.0], ids=["unguided", "guided"])
@pytest.mark.parametrize("levels", ["official", "scheduler"])
def test_full_resolution_loop_is_the_pipelines(reference, scale, levels, monkeypatch):
    text = reference.encode(PROMPTS)
    negative = reference.encode(NEGATIVES) if scale else None
    latents = noise(2, 4, 8, 12)
    kind = {"noise_levels": levels} if levels == "scheduler" else {}
    ours = reference.denoise([latents], text, negative, num_inference_steps=9, guidance_scale=scale, **kind)
    pipeline, own, sigmas = reference.pipeline, reference.pipeline.scheduler, None
    if levels == "scheduler":
        # The scheduler's own steps, which the pipeline would not choose, and no second shift of them.
        sigmas = own_steps(own, 9).sigmas[:-1].tolist()
        monkeypatch.setattr(pipeline, "scheduler", FlowMatchEulerDiscreteScheduler(shift=1.0))

    def official(output_type):
        return pipeline(
            # Lists of its own each time: the pipeline writes its template into them.
            list(PROMPTS),
            negative_prompt=list(NEGATIVES),
            guidance_scale=scale,
            height=64,
            width=96,
            num_inference_steps=9,
            sigmas=sigmas,
            latents=torch.from_numpy(latents),
            output_type=output_type,
        ).images

    assert relative(ours, official("latent")) <= 1e-5
    decoded, images = reference.decode(ours), official("np")
    assert decoded.shape == (2, 64, 96, 3)
    np.testing.assert_allclose(decoded, images, atol=1e-4)
    # Most of them lie between the ends that the VAE clamps to.
    assert np.mean((images > 0.01) & (images < 0.99)) > 0.5


@pytest.mark.parametrize(("delta", "start"), [(0.01, 26), (0.05, 35), (0.10, 39)])
def test_published_splits_at_1024(delta, start):
    sigmas = own_steps(tiny.z_image_scheduler(), 50).sigmas[:-1].tolist()
    assert spectral.stage_starts(sigmas, 128, 128, levels=1, delta=delta) == [0, start]


def test_the_schedulers_own_steps_are_the_pipelines_and_one_almost_at_nothing(reference):
    scheduler = reference.pipeline.scheduler
    nine = own_steps(scheduler, 9).sigmas
    pipelines = own_steps(scheduler, 8)
    pipelines.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8))
    np.testing.assert_allclose(nine[:8], pipelines.sigmas[:8], atol=0.015)
    assert 0 < nine[8] < 0.04


def test_texts_are_as_long_as_their_prompts(reference):
    lengths = [len(text) for text in reference.encode(["", "a lake", "a lake" * 200])]
    # A token a character, and the template's words and marks.
    assert lengths[1] - lengths[0] == len("a lake")
    assert lengths[2] == 512


def test_velocity_points_from_picture_to_noise(reference):
    """A first-order check of the sign: the pipeline's own Euler step, taken by hand."""
    text, latents = reference.encode(PROMPTS), torch.from_numpy(noise(2, 4, 8, 12))
    sigmas = own_steps(reference.pipeline.scheduler, 2).sigmas
    step = reference.pipeline(
        list(PROMPTS),
        latents=latents,
        guidance_scale=0.0,
        height=64,
        width=96,
        num_inference_steps=1,
        sigmas=[1.0],
        output_type="latent",
    ).images
    assert sigmas[0] == 1
    assert relative(step, latents - reference.velocity(latents, 1.0, text)) <= 1e-6


@pytest.mark.parametrize("mode", ["dct", "dct_rewind"])
@pytest.mark.parametrize("levels", [1, 2])
def test_progressive_loop_follows_the_method_step_by_step(reference, mode, levels):
    grids = spectral.stage_grids(16, 24, levels)
    noises = [noise(2, 4, *grid, seed=number) for number, grid in enumerate(grids)]
    text, negative = reference.encode(PROMPTS), reference.encode(NEGATIVES)
    ours = reference.denoise(
        noises,
        text,
        negative,
        num_inference_steps=STEPS,
        guidance_scale=2.0,
        noise_levels="scheduler",
        mode=mode,
        levels=levels,
        delta=DELTA,
        spectrum=STEEP,
    )
    sigmas = own_steps(reference.pipeline.scheduler, STEPS).sigmas.double().tolist()
    starts = spectral.stage_starts(sigmas[:-1], 16, 24, levels=levels, delta=DELTA, spectrum=STEEP)
    latents = noises[0].astype(np.float64)
    for stage, (start, end) in enumerate(pairwise([*starts, STEPS])):
        if stage:
            sigma, (h, w) = sigmas[start], latents.shape[-2:]
            coefficients = sigma * noises[stage].astype(np.float64)
            coefficients[..., :h, :w] = dctn(latents, axes=(-2, -1), norm="ortho")
            latents = idctn(coefficients, axes=(-2, -1), norm="ortho")
            if mode == "dct_rewind":
                latents, sigmas[start] = latents * 2 / (1 + sigma), 2 * sigma / (1 + sigma)
        for i in range(start, end):
            x = torch.from_numpy(latents).float()
            own, away = (
                reference.velocity(x, sigmas[i], states).double().numpy() for states in (text, negative)
            )
            latents = latents + (sigmas[i + 1] - sigmas[i]) * (3 * own - 2 * away)
    assert relative(ours, latents) <= 1e-5


def test_noise_that_does_not_fit_the_stages_is_refused(reference):
    text = reference.encode(PROMPTS)
    with pytest.raises(ValueError, match="one noise array is needed for each"):
        reference.denoise([noise(2, 4, 8, 12)], text, num_inference_steps=STEPS, mode="dct")


def test_tiny_checkpoint_can_be_sharded_and_stored_in_bfloat16(tmp_path):
    tiny.write_z_image(tmp_path, dtype=torch.bfloat16, shard_size="100KB")
    assert (tmp_path / "transformer/diffusion_pytorch_model.safetensors.index.json").exists()
    stored = set()
    for shard in (tmp_path / "transformer").glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            stored |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    assert stored == {"BF16"}
    reference = ZImageReference.from_pretrained(tmp_path, dtype=torch.bfloat16)
    velocity = reference.velocity(torch.zeros(2, 4, 8, 8), 0.5, reference.encode(PROMPTS))
    assert velocity.dtype == torch.float32
    assert velocity.isfinite().all()


def test_tiny_checkpoint_has_no_parameter_as_initialised(reference):
    tiny.assert_randomised(reference.pipeline)
