"""The whole denoising loop beside the PyTorch reference, and what it compiles."""

from dataclasses import dataclass
from itertools import pairwise

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspd.convert.checkpoint import Checkpoint
from jaxspd.convert.loader import load_parameters
from jaxspd.families import open_family
from jaxspd.sampling.loop import denoise
from jaxspd.sampling.noise import stage_noises
from jaxspd.sampling.programs import Programs
from jaxspd.sampling.solvers import euler
from jaxspd.spectral.levels import halvings
from jaxspd.spectral.spectrum import Spectrum
from tests.compare import relative
from tests.plans import plan_of
from torch_ref.flux1 import Flux1Reference, set_schedule
from torch_ref.spectral import stage_starts

LATENT = (16, 24)
CHANNELS = 4
# Steep enough that 4×6, 8×12 and 16×24 latents all get several of a dozen steps.
SPECTRUM = (20.0, 3.0)
PROMPTS = ["a red house", "Blue hills, night"]


@dataclass
class Model:
    """One tiny FLUX.1 on both sides."""

    family: object
    parameters: object
    reference: Flux1Reference

    def programs(self):
        return Programs(self.family.velocity_function(jnp.float32), euler)

    def plan(self, mode, levels, delta, steps):
        return plan_of(
            halvings(LATENT, levels),
            self.family.sigmas(steps, self.tokens(LATENT)),
            Spectrum(*SPECTRUM),
            mode=mode,
            delta=delta,
            tokens=self.tokens,
        )

    def tokens(self, latent):
        return self.family.tokens((CHANNELS, *latent))

    def conditioning(self, prompts, guidance):
        """Both sides denoise from the reference's own embeddings."""
        text, pooled = self.reference.encode(prompts)
        return self.family.condition({"text": text.numpy(), "pooled": pooled.numpy()}, guidance)

    def run(self, programs, plan, seeds, prompts=PROMPTS, guidance=3.5):
        conditioning = self.conditioning(prompts, guidance)
        noises = stage_noises(seeds, (CHANNELS,), [stage.latent for stage in plan.stages])
        programs.prepare(plan, (len(seeds), CHANNELS), self.parameters, conditioning)
        latents, _ = denoise(programs, plan, self.parameters, conditioning, noises)
        return np.asarray(latents)


@pytest.fixture(scope="module")
def model(flux1_folder):
    family = open_family(flux1_folder)
    abstract = family.abstract_parameters(jnp.float32)
    parameters = load_parameters(Checkpoint(flux1_folder / "transformer"), abstract, family.rules)
    return Model(family, parameters, Flux1Reference.from_pretrained(flux1_folder))


@pytest.fixture(scope="module")
def programs(model):
    """Shared, so that each resolution compiles once for all comparisons."""
    return model.programs()


@pytest.mark.parametrize(
    ("mode", "levels", "split"),
    [
        ("fullres", 0, [14]),
        ("dct", 1, [6, 8]),
        ("dct_rewind", 1, [6, 8]),
        ("dct_rewind", 2, [2, 4, 8]),
    ],
)
def test_latents_are_the_references(model, programs, mode, levels, split):
    steps, delta, seeds, guidance = 14, 0.05, [5, 6], 3.0
    plan = model.plan(mode, levels, delta, steps)
    sigmas = set_schedule(model.reference.pipeline.scheduler, steps, model.tokens(LATENT))
    starts = stage_starts(sigmas, *LATENT, levels=levels, delta=delta, spectrum=SPECTRUM)
    assert [stage.start for stage in plan.stages] == starts
    # Every stage has steps in number, or the comparison would hardly see it.
    assert [stage.steps for stage in plan.stages] == split

    theirs = model.reference.denoise(
        stage_noises(seeds, (CHANNELS,), [stage.latent for stage in plan.stages]),
        *model.reference.encode(PROMPTS),
        num_inference_steps=steps,
        guidance_scale=guidance,
        mode=mode,
        levels=levels,
        delta=delta,
        spectrum=SPECTRUM,
    )
    ours = model.run(programs, plan, seeds, guidance=guidance)
    chex.assert_shape(ours, (2, CHANNELS, *LATENT))
    for picture, expected in zip(ours, theirs, strict=True):
        assert relative(picture, expected) <= 1e-4


def test_modes_give_latents_of_their_own(model, programs):
    """Else one mode could pass for another."""
    dct, rewind = (model.run(programs, model.plan(m, 1, 0.05, 14), [5, 6]) for m in ("dct", "dct_rewind"))
    assert relative(dct, rewind) > 0.01


@pytest.mark.parametrize("levels", [1, 2])
def test_nothing_but_a_new_size_compiles(model, compiled, levels):
    programs = model.programs()
    plan = model.plan("dct_rewind", levels, 0.05, 14)
    model.run(programs, plan, [5, 6])
    assert (programs.compiled_steps, programs.compiled_transitions) == (levels + 1, levels)
    # The listener hears the steps, or its later silence would mean nothing. (It need not hear the
    # transitions: JAX shares those among all models of a process.)
    assert len(compiled) >= levels + 1

    # Other σ, step count, split, κ, seeds, prompts and guidance.
    other = model.plan("dct", levels, 0.02, 17)
    assert [s.steps for s in other.stages] != [s.steps for s in plan.stages]
    compiled.clear()
    model.run(programs, other, [70, 80], prompts=["x", "a much longer description of a lake"], guidance=1.0)
    assert (programs.compiled_steps, programs.compiled_transitions) == (levels + 1, levels)
    assert compiled == []

    # Full resolution is one of the sizes already there.
    model.run(programs, model.plan("fullres", 0, 0.05, 12), [5, 6])
    assert programs.compiled_steps == levels + 1
    assert compiled == []


# The loop alone, with a velocity that a hand can compute.


def drift(parameters, latents, sigma, conditioning):
    return parameters * jnp.ones_like(latents) * conditioning


def plan_by_hand(mode="dct_rewind"):
    levels, sigmas = halvings((4, 6), 1), [1.0, 0.9, 0.5, 0.2, 0.0]
    spectrum = Spectrum(4.0, 1.0)  # P(1) = 4, so at δ = 0.5 the fine grid starts at 0.86
    return plan_of(levels, sigmas, spectrum, mode=mode, delta=0.5, tokens=lambda g: g[0] * g[1])


def run_by_hand(plan, noises, progress=lambda *_: None):
    programs, arguments = Programs(drift, euler), (np.float32(0.5), np.float32(3.0))
    programs.prepare(plan, (1, 2), *arguments)
    assert programs.wait() >= 0
    return denoise(programs, plan, *arguments, noises, progress)


def test_progress_tells_stage_step_and_the_sigma_reached():
    heard, plan = [], plan_by_hand()
    noises = stage_noises([1], (2,), [stage.latent for stage in plan.stages])
    _, seconds = run_by_hand(plan, noises, heard.append)
    assert [(s.stage, s.number, s.reached) for s in heard] == [
        (0, 0, 0.9),
        (0, 1, 0.5),
        (1, 2, 0.2),
        (1, 3, 0.0),
    ]
    assert len(seconds) == 2
    assert min(seconds) > 0


@pytest.mark.parametrize("mode", ["dct", "dct_rewind"])
def test_a_constant_velocity_moves_latents_by_sigma(mode):
    plan = plan_by_hand(mode)
    # Constant latents under noise of zero: the grid's growth halves them, κ = 2 / (1 + 1/2) scales
    # them, and v = 1.5 moves them by as much as σ falls, from 1 to 0.5 and on from κ·0.5 to 0.
    kappa = 4 / 3 if mode == "dct_rewind" else 1
    expected = kappa * (1 - 1.5 * 0.5) / 2 - 1.5 * kappa * 0.5
    noises = [np.ones((1, 2, 2, 3), np.float32), np.zeros((1, 2, 4, 6), np.float32)]
    latents, _ = run_by_hand(plan, noises)
    chex.assert_trees_all_close(latents, np.full((1, 2, 4, 6), expected, np.float32), rtol=0, atol=1e-6)


def aligned(array):
    """A copy at an address that XLA takes as it is, without a copy of its own."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def test_the_callers_noise_is_left_as_it_was():
    # The CPU backend may work on the caller's memory itself: no program may write into it.
    plan = plan_by_hand()
    drawn = stage_noises([1], (2,), [stage.latent for stage in plan.stages])
    lent = [aligned(noise) for noise in drawn]
    first, _ = run_by_hand(plan, lent)
    chex.assert_trees_all_equal(lent, drawn)
    chex.assert_trees_all_equal(run_by_hand(plan, lent)[0], first)


def test_the_plan_and_the_loop_agree_on_every_sigma():
    """What reaches the model is the plan's σ, rewound entry included."""
    seen, plan = [], plan_by_hand()

    def velocity(parameters, latents, sigma, conditioning):
        jax.debug.callback(lambda s: seen.append(float(s)), sigma, ordered=True)
        return jnp.zeros_like(latents)

    programs, nothing = Programs(velocity, euler), np.float32(0)
    programs.prepare(plan, (1, 2), nothing, nothing)
    denoise(programs, plan, nothing, nothing, stage_noises([1], (2,), [s.latent for s in plan.stages]))
    jax.effects_barrier()
    wanted = [sigma for stage in plan.stages for sigma, _ in pairwise(stage.sigmas)]
    assert seen == pytest.approx(wanted, rel=1e-6)
    assert wanted[2] == pytest.approx(2 / 3, rel=1e-12)
