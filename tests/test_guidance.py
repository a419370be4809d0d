"""Classifier-free guidance, in one forward or two, and which of them is compiled."""

import jax
import numpy as np
import pytest

from jaxspd.errors import UsageError
from jaxspd.sampling import programs
from jaxspd.sampling.guidance import Guided, guide
from jaxspd.sampling.loop import denoise
from jaxspd.sampling.noise import stage_noises
from jaxspd.sampling.programs import Programs
from jaxspd.sampling.solvers import SOLVERS
from jaxspd.spectral.levels import halvings
from jaxspd.spectral.spectrum import Spectrum
from tests.plans import plan_of

SHAPE = (2, 3, 1, 4, 6)


def velocity(parameters, latents, sigma, conditioning):
    """Something of everything, element by element."""
    return parameters * latents * sigma + conditioning["text"].sum(-1).reshape(-1, 1, 1, 1, 1) ** 3


def draw(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_leads_away_from_the_negative_prompt(batched):
    latents, positive, negative = draw(*SHAPE, seed=0), draw(2, 5, seed=1), draw(2, 5, seed=2)
    scale = np.array([5.0, 1.5], np.float32)
    with_prompt, without = (velocity(2.0, latents, 0.7, {"text": text}) for text in (positive, negative))
    expected = without + scale.reshape(2, 1, 1, 1, 1) * (with_prompt - without)
    conditioning = Guided({"text": positive}, {"text": negative}, scale)
    ours = jax.jit(guide(velocity, batched=batched))(2.0, latents, 0.7, conditioning)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batched", [True, False])
def test_without_a_negative_prompt_there_is_one_plain_forward(batched):
    seen = []

    def spy(parameters, latents, sigma, conditioning):
        seen.append(latents.shape)
        return velocity(parameters, latents, sigma, conditioning)

    conditioning = {"text": draw(2, 5, seed=1)}
    latents = draw(*SHAPE, seed=0)
    ours = guide(spy, batched=batched)(2.0, latents, 0.7, conditioning)
    np.testing.assert_array_equal(ours, velocity(2.0, latents, 0.7, conditioning))
    assert seen == [SHAPE]


def forward_batches(monkeypatch, limit):
    """The batch sizes of the forwards of a run on a device with room for `limit` bytes."""
    seen = []

    def spy(parameters, latents, sigma, conditioning):
        jax.debug.callback(lambda x: seen.append(len(x)), latents)
        return velocity(parameters, latents, sigma, conditioning)

    plan = plan_of(
        halvings((4, 6), 0), [1.0, 0.0], Spectrum(1.0, 1.0), mode="fullres", delta=0.1, tokens=lambda grid: 1
    )
    conditioning = Guided({"text": draw(1, 5, seed=1)}, {"text": draw(1, 5, seed=2)}, np.ones(1, np.float32))
    made = Programs(guide(spy, batched=True), SOLVERS["euler"], guide(spy, batched=False))
    with monkeypatch.context() as patched:
        patched.setattr(programs, "memory_limit", lambda device: limit)
        made.prepare(plan, (1, 3, 1), np.float32(2), conditioning)
        made.wait()
    denoise(made, plan, np.float32(2), conditioning, stage_noises([1], (3, 1), [(4, 6)]))
    jax.effects_barrier()
    return seen


def test_two_forwards_replace_one_where_memory_is_short(monkeypatch):
    assert forward_batches(monkeypatch, limit=2**40) == [2]
    assert forward_batches(monkeypatch, limit=1000) == [1, 1]


def test_a_step_that_no_way_fits_is_refused(monkeypatch):
    with pytest.raises(UsageError, match=r"a step on the latent grid 4×6 takes .* use a smaller height"):
        forward_batches(monkeypatch, limit=64)
