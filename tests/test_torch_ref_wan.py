"""The judge of Wan, judged: against diffusers' own pipeline, published numbers and plain arithmetic."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from safetensors import safe_open
from scipy.fft import dctn, idctn

from tests import tiny
from tests.compare import relative
from torch_ref import spectral
from torch_ref.solvers import solver_on
from torch_ref.wan import WanReference, set_schedule

PROMPTS = ["a red house", "Blue hills, night"]
NEGATIVES = ["blurred", ""]
TEXT_LENGTH = 24
STEPS, DELTA, SHIFT = 8, 0.05, 3.0
# Steep enough to give 4 x 6, 8 x 12 and 16 x 24 latents a share of eight steps each.
TINY_SPECTRUM = (20.0, 3.0)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def stage_noises(levels: int) -> list[np.ndarray]:
    return [noise(2, 4, 3, 16 // 2**k, 24 // 2**k, seed=k) for k in range(levels, -1, -1)]


def open_tiny(folder, **arguments) -> WanReference:
    reference = WanReference.from_pretrained(tiny.write_wan(folder, text_length=TEXT_LENGTH, **arguments))
    reference.pipeline.set_progress_bar_config(disable=True)
    return reference


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> WanReference:
    """As published: time steps and sigmas of the UniPC scheduler."""
    return open_tiny(tmp_path_factory.mktemp("wan"), flow_shift=SHIFT)


@pytest.fixture(scope="module")
def euler_reference(tmp_path_factory) -> WanReference:
    """The same weights with the other scheduler that ``WanPipeline`` takes."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    return open_tiny(tmp_path_factory.mktemp("wan"), scheduler=scheduler)


@pytest.fixture(params=["reference", "euler_reference"])
def either(request) -> WanReference:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def embeddings(reference):
    return reference.encode(PROMPTS, NEGATIVES)


class Calls:
    """Latents ``[B, C, T, H, W]``, time and answer of every call to the transformer, as it is made."""

    def __init__(self, reference: WanReference) -> None:
        self.latents, self.timesteps, self.velocities = [], [], []
        self.transformer = reference.pipeline.transformer

    def __enter__(self) -> Calls:
        self.hook = self.transformer.register_forward_hook(self.record, with_kwargs=True)
        return self

    def __exit__(self, *_) -> None:
        self.hook.remove()

    def record(self, _module, _args, kwargs, output) -> None:
        self.latents.append(kwargs["hidden_states"].numpy())
        self.timesteps.append(kwargs["timestep"][0].item())
        self.velocities.append(output[0].numpy())


@torch.no_grad()
def guided(reference, latents, timestep, embeddings, scale) -> np.ndarray:
    """Velocity in float64 arithmetic around the model's two passes."""
    times = torch.full((len(latents),), timestep)
    latents = torch.as_tensor(latents, dtype=torch.float32)
    positive, negative = (
        reference.pipeline.transformer(latents, times, embeds).sample.double().numpy()
        for embeds in embeddings
    )
    return negative + scale * (positive - negative)


def grown(latents, fine, sigma, mode) -> tuple[np.ndarray, float]:
    """``latents`` on the grid of the coefficients' noise ``fine``, and their noise level."""
    coefficients = sigma * fine.astype(np.float64)
    coarse = dctn(latents, axes=(-2, -1), norm="ortho")
    coefficients[..., : coarse.shape[-2], : coarse.shape[-1]] = coarse
    latents = idctn(coefficients, axes=(-2, -1), norm="ortho")
    factor = 2 / (1 + sigma) if mode == "dct_rewind" else 1
    return factor * latents, factor * sigma


@pytest.mark.parametrize(("delta", "split"), [(0.01, 23), (0.02, 27), (0.05, 33), (0.10, 37)])
def test_published_splits_at_480x832(delta, split):
    sigmas = set_schedule(tiny.wan_scheduler(5.0), 50).sigmas[:-1].tolist()
    spectrum = spectral.WAN_SPECTRUM
    starts = spectral.stage_starts(sigmas, 60, 104, levels=1, delta=delta, spectrum=spectrum)
    assert starts == [0, split]


@pytest.mark.parametrize(
    ("scale", "steps", "shift"),
    # Nine unshifted steps have sigmas such as 0.778, whose time 778 is lost by a float32's rounding.
    [(2.5, 5, None), (1.0, 5, 5.0), (2.5, 9, 1.0)],
    ids=["guided", "unguided", "whole times"],
)
@pytest.mark.parametrize("checkpoint", ["reference", "euler_reference"])
def test_full_resolution_loop_is_the_pipelines(checkpoint, scale, steps, shift, request):
    reference = request.getfixturevalue(checkpoint)
    latents = noise(2, 4, 3, 8, 12)
    ours = reference.denoise(
        [latents],
        *reference.encode(PROMPTS, NEGATIVES if scale > 1 else None),
        num_inference_steps=steps,
        guidance_scale=scale,
        scheduler="unipc" if checkpoint == "reference" else "euler",
        flow_shift=shift,
    )

    pipeline = reference.pipeline
    arguments = {
        "prompt": PROMPTS,
        "negative_prompt": NEGATIVES,
        "height": 64,
        "width": 96,
        "num_frames": 9,
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "latents": torch.from_numpy(latents),
        "max_sequence_length": TEXT_LENGTH,
    }
    own = pipeline.scheduler
    if shift is not None:
        pipeline.scheduler = type(own).from_config(own.config, shift=shift, flow_shift=shift)
    try:
        theirs = pipeline(output_type="latent", **arguments).frames
        frames = pipeline(output_type="np", **arguments).frames
    finally:
        pipeline.scheduler = own
    assert relative(ours, theirs) <= 1e-5
    decoded = reference.decode(ours)
    assert decoded.shape == (2, 9, 64, 96, 3)
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded, frames, atol=1e-4)
    # Most of them lie between the ends that the VAE clamps to.
    assert np.mean((frames > 0.01) & (frames < 0.99)) > 0.5


def test_flow_shift_replaces_the_checkpoints_own(either):
    own = either.pipeline.scheduler
    three, seven = (set_schedule(own, STEPS, shift).sigmas for shift in (None, 7.0))
    ratios = (seven[1:-1] / (1 - seven[1:-1])) / (three[1:-1] / (1 - three[1:-1]))
    # Euler's levels run between ends that were shifted already, so its shift counts about twice.
    power = 1 if isinstance(own, UniPCMultistepScheduler) else 2
    assert ratios[-1].item() == pytest.approx((7 / SHIFT) ** power, rel=0.01)
    assert own.config.get("flow_shift", own.config.get("shift")) == SHIFT


def test_guidance_is_two_passes_or_one(either, embeddings):
    latents, sigma, scale = torch.from_numpy(noise(2, 4, 3, 4, 6)), 0.7777, 3.0
    times = 777 if isinstance(either.pipeline.scheduler, UniPCMultistepScheduler) else 777.7
    with Calls(either) as calls:
        ours = either.velocity(latents, sigma, *embeddings, scale)
    assert calls.timesteps == pytest.approx([times, times])
    assert relative(ours, guided(either, latents, times, embeddings, scale)) <= 1e-6

    with Calls(either) as calls:
        alone = either.velocity(latents, sigma, embeddings[0], guidance_scale=scale)
    assert len(calls.velocities) == 1
    assert relative(alone, either.velocity(latents, sigma, *embeddings, 1.0)) <= 1e-6


def test_text_after_a_prompts_end_is_zero(reference, embeddings):
    positive, negative = embeddings
    assert positive.shape == negative.shape == (2, TEXT_LENGTH, 24)
    # One token a character, a word's mark, and the end token: "blurred" has 7 + 1 + 1, "" the last alone.
    assert negative.abs().sum(-1).gt(0).sum(-1).tolist() == [9, 1]
    alone, nothing = reference.encode(PROMPTS)
    assert nothing is None
    assert torch.equal(alone, positive)


@pytest.mark.parametrize("mode", ["dct", "dct_rewind"])
@pytest.mark.parametrize("levels", [1, 2])
def test_progressive_euler_follows_the_method_step_by_step(either, embeddings, mode, levels):
    noises, scale = stage_noises(levels), 2.0
    with Calls(either) as calls:
        ours = either.denoise(
            noises,
            *embeddings,
            num_inference_steps=STEPS,
            guidance_scale=scale,
            scheduler="euler",
            mode=mode,
            levels=levels,
            delta=DELTA,
            spectrum=TINY_SPECTRUM,
        )

    whole = isinstance(either.pipeline.scheduler, UniPCMultistepScheduler)
    sigmas = set_schedule(either.pipeline.scheduler, STEPS).sigmas.double().tolist()
    starts = spectral.stage_starts(sigmas[:-1], 16, 24, levels=levels, delta=DELTA, spectrum=TINY_SPECTRUM)
    latents, times = noises[0].astype(np.float64), []
    for i in range(STEPS):
        if i in starts[1:]:
            latents, sigmas[i] = grown(latents, noises[starts.index(i)], sigmas[i], mode)
        times.append(int(1000 * sigmas[i]) if whole else 1000 * sigmas[i])
        velocity = guided(either, latents, times[-1], embeddings, scale)
        latents = latents + (sigmas[i + 1] - sigmas[i]) * velocity
    assert calls.timesteps[::2] == pytest.approx(times, rel=0 if whole else 1e-6)
    assert relative(ours, latents) <= 1e-5


@pytest.mark.parametrize("mode", ["dct", "dct_rewind"])
@pytest.mark.parametrize("levels", [1, 2])
def test_progressive_unipc_begins_anew_on_every_grid(either, embeddings, mode, levels):
    """Every stage is a fresh scheduler, set to the sigmas that are left, whose first one is aligned."""
    noises, scale = stage_noises(levels), 2.0
    ours = either.denoise(
        noises,
        *embeddings,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        mode=mode,
        levels=levels,
        delta=DELTA,
        spectrum=TINY_SPECTRUM,
    )

    own = either.pipeline.scheduler
    whole = isinstance(own, UniPCMultistepScheduler)
    sigmas = solver_on(set_schedule(own, STEPS), "unipc").sigmas.double().numpy()[:-1]
    starts = spectral.stage_starts(sigmas, 16, 24, levels=levels, delta=DELTA, spectrum=TINY_SPECTRUM)
    latents = noises[0]
    for stage, (start, end) in enumerate(pairwise([*starts, STEPS])):
        if stage:
            latents, sigmas[start] = grown(latents, noises[stage], sigmas[start], mode)
        fresh = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        fresh.set_timesteps(sigmas=sigmas[start:])
        latents = torch.as_tensor(latents, dtype=torch.float32)
        for i in range(start, end):
            # Euler's scheduler starts at exactly 1, and that is what its model is told.
            time = int(1000 * sigmas[i]) if whole else 1000 * (sigmas[i] if i else 1.0)
            velocity = guided(either, latents, time, embeddings, scale)
            fresh.set_begin_index(0)
            step = fresh.step(torch.as_tensor(velocity, dtype=torch.float32), time, latents)
            latents = step.prev_sample
    assert relative(ours, latents) <= 1e-5


@pytest.mark.parametrize("mode", ["dct", "dct_rewind"])
def test_unipcs_first_step_on_a_grid_is_first_order(reference, embeddings, mode):
    """First-order UniP, e^-h = (alpha sigma') / (alpha' sigma), by hand; no other step is."""
    with Calls(reference) as calls:
        reference.denoise(
            stage_noises(2),
            embeddings[0],
            num_inference_steps=STEPS,
            mode=mode,
            levels=2,
            delta=DELTA,
            spectrum=TINY_SPECTRUM,
        )

    sigmas = set_schedule(reference.pipeline.scheduler, STEPS).sigmas.double().numpy()
    starts = spectral.stage_starts(sigmas[:-1], 16, 24, levels=2, delta=DELTA, spectrum=TINY_SPECTRUM)
    if mode == "dct_rewind":
        for i in starts[1:]:
            sigmas[i] *= 2 / (1 + sigmas[i])
    gaps = {}
    for i in range(STEPS - 1):
        if i + 1 in starts:
            continue
        sigma, after = sigmas[i : i + 2]
        latents = calls.latents[i].astype(np.float64)
        clean = latents - sigma * calls.velocities[i]
        decay = (1 - sigma) * after / ((1 - after) * sigma)
        first_order = after / sigma * latents - (1 - after) * (decay - 1) * clean
        gaps[i] = relative(calls.latents[i + 1], first_order)
    assert set(starts) < set(gaps)
    assert all(gap <= 1e-6 if i in starts else gap >= 1e-3 for i, gap in gaps.items()), gaps


def test_solver_steps_on_the_checkpoints_own_sigmas(reference, euler_reference):
    unipc = set_schedule(reference.pipeline.scheduler, STEPS)
    euler = set_schedule(euler_reference.pipeline.scheduler, STEPS)
    assert solver_on(unipc, "unipc") is unipc
    assert solver_on(euler, "euler") is euler
    assert torch.equal(solver_on(unipc, "euler").sigmas, unipc.sigmas)
    assert euler.sigmas[0] == 1
    other = solver_on(euler, "unipc").sigmas
    assert other[0].item() == pytest.approx(1 - 1e-6, abs=1e-7)
    assert torch.equal(other[1:], euler.sigmas[1:])
    with pytest.raises(ValueError, match="unknown scheduler 'heun'"):
        solver_on(euler, "heun")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 4, 3, 8, 12)], "one noise array is needed for each"),
        ([(2, 4, 3, 4, 6), (2, 4, 3, 8, 8)], "one noise array is needed for each"),
        # A broadcast would hide these two.
        ([(1, 4, 3, 4, 6), (2, 4, 3, 8, 12)], "otherwise alike"),
        ([(2, 4, 1, 4, 6), (2, 4, 3, 8, 12)], "otherwise alike"),
        ([(2, 4, 3, 4, 3), (2, 4, 3, 8, 6)], "even"),
    ],
)
def test_noise_that_does_not_fit_the_stages_is_refused(reference, embeddings, shapes, message):
    noises = [noise(*shape) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        reference.denoise(noises, *embeddings, num_inference_steps=STEPS, mode="dct")


def test_tiny_checkpoint_can_be_sharded_and_stored_in_bfloat16(tmp_path):
    tiny.write_wan(tmp_path, text_length=TEXT_LENGTH, dtype=torch.bfloat16, shard_size="100KB")
    assert (tmp_path / "transformer/diffusion_pytorch_model.safetensors.index.json").exists()
    stored = {}
    for shard in (tmp_path / "transformer").glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            stored |= {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    reference = WanReference.from_pretrained(tmp_path, dtype=torch.bfloat16)
    parameters = dict(reference.pipeline.transformer.named_parameters())
    names = {torch.bfloat16: "BF16", torch.float32: "F32"}
    assert stored == {key: names[parameter.dtype] for key, parameter in parameters.items()}
    assert set(stored.values()) == {"BF16", "F32"}
    assert reference.pipeline.vae.dtype == torch.float32
    velocity = reference.velocity(torch.zeros(2, 4, 3, 8, 8), 0.5, *reference.encode(PROMPTS, NEGATIVES))
    assert velocity.dtype == torch.float32
    assert velocity.isfinite().all()


def test_tiny_checkpoint_has_no_parameter_as_initialised(reference):
    tiny.assert_randomised(reference.pipeline)
