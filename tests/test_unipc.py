"""UniPC and its noise levels beside diffusers' scheduler."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from jaxspd.errors import UsageError
from jaxspd.sampling.schedule import default_sigmas, flow_match_sigmas, override_shift
from jaxspd.sampling.solvers import default_solver
from jaxspd.sampling.unipc import unipc
from jaxspd.spectral.expansion import expand
from jaxspd.spectral.plan import alignment
from tests import tiny
from tests.compare import relative

SHAPE = (2, 4, 3, 6, 8)


def config_of(scheduler):
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 20, 50])
@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler])
def test_sigmas_are_the_schedulers_own(kind, steps, shift):
    unipc_only = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    scheduler = kind(**(unipc_only if kind is UniPCMultistepScheduler else {"shift": shift}))
    scheduler.set_timesteps(steps)
    ours = default_sigmas(config_of(scheduler), steps)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_models_are_told_the_schedulers_time_steps(shift):
    """To the last one, of any number of steps, although float32 rounds what is almost whole."""
    scheduler, told = tiny.wan_scheduler(shift), jax.jit(lambda sigma: jnp.floor(1000 * sigma))
    for steps in range(1, 201):
        scheduler.set_timesteps(steps)
        sigmas = default_sigmas(config_of(scheduler), steps)
        np.testing.assert_array_equal(np.floor(np.float32(1000) * sigmas[:-1]), scheduler.timesteps.numpy())
    np.testing.assert_array_equal(told(sigmas[:-1]), scheduler.timesteps.numpy())


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_steps_are_the_schedulers(steps, shift):
    """Over a whole schedule, with a velocity that is neither linear nor independent of σ."""
    draw = np.random.default_rng(0)
    noise = draw.standard_normal(SHAPE, dtype=np.float32)
    mix = 0.4 * draw.standard_normal((SHAPE[-1], SHAPE[-1]), dtype=np.float32)

    scheduler = tiny.wan_scheduler(shift)
    scheduler.set_timesteps(steps)
    theirs = torch.from_numpy(noise)
    for time, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        velocity = torch.tanh(theirs @ torch.from_numpy(mix)) * (1 + sigma) - 0.3 * theirs
        theirs = scheduler.step(velocity, time, theirs).prev_sample

    ours, step = jnp.asarray(noise), jax.jit(unipc.step)
    state = unipc.init(ours)
    for sigma, next_sigma in pairwise(default_sigmas(config_of(scheduler), steps)):
        velocity = jnp.tanh(ours @ mix) * (1 + sigma) - 0.3 * ours
        ours, state = step(state, ours, velocity, sigma, next_sigma)
    assert relative(ours, theirs) <= 1e-5


def solve(solver_step, state, latents, sigmas):
    """`dx/dσ = x + cos 3σ`, from `sigmas[0]` to `sigmas[-1]`."""
    for sigma, next_sigma in pairwise(sigmas):
        velocity = latents + np.float32(np.cos(3 * sigma))
        latents, state = solver_step(state, latents, velocity, np.float32(sigma), np.float32(next_sigma))
    return float(latents[0])


def test_its_error_falls_with_the_third_power_of_the_step():
    """The corrector lifts the second-order predictor by one order (arXiv 2302.04867, theorem 3.1)."""

    def exact(sigma, start=1.0, origin=0.8):
        def particular(s):
            return (3 * np.sin(3 * s) - np.cos(3 * s)) / 10

        return particular(sigma) + (start - particular(origin)) * np.exp(sigma - origin)

    start = jnp.ones(1)
    errors = [
        abs(solve(unipc.step, unipc.init(start), start, np.linspace(0.8, 0.2, n + 1)) - exact(0.2))
        for n in (8, 16)
    ]
    assert errors[0] > 1e-5  # well above rounding, or the ratio would mean nothing
    assert errors[0] / errors[1] > 5


def test_after_init_nothing_is_remembered():
    draw = np.random.default_rng(1)
    latents, velocity = (jnp.asarray(draw.standard_normal(SHAPE, dtype=np.float32)) for _ in range(2))
    fresh, state = unipc.step(unipc.init(latents), latents, velocity, 0.8, 0.7)
    # First order: exact for a constant prediction of the clean picture.
    clean = latents - 0.8 * velocity
    np.testing.assert_allclose(fresh, clean + 0.7 * velocity, rtol=0, atol=1e-5)
    remembered, _ = unipc.step(state, fresh, 2 * velocity, 0.7, 0.6)
    forgotten, _ = unipc.step(unipc.init(fresh), fresh, 2 * velocity, 0.7, 0.6)
    assert relative(remembered, forgotten) > 1e-3


@pytest.mark.parametrize("ratio", [2.0, 1.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_it_steps_on_a_finer_grid_as_it_would_have_on_the_coarser(ratio, steps):
    """The logarithm of the signal-to-noise ratio differs by log r throughout: stepping and growing commute
    where all signal is in the coarse grid's frequencies. A `ratio` of 1 aligns nothing.
    """
    draw = np.random.default_rng(4)
    noise = jnp.asarray(draw.standard_normal((1, 2, 6, 8), dtype=np.float32))

    def grown(latents, sigma, kappa):
        return expand(latents, noise, sigma, kappa)

    sigmas = np.linspace(0.95, 0.3, steps + 3, dtype=np.float32)
    latents = jnp.asarray(draw.standard_normal((1, 2, 4, 5), dtype=np.float32))
    state = unipc.init(latents)
    cleans = jnp.asarray(draw.standard_normal((len(sigmas), *latents.shape), dtype=np.float32))

    def advance(state, latents, clean, sigma, next_sigma):
        return unipc.step(state, latents, (latents - clean) / sigma, sigma, next_sigma)

    for step in range(steps):
        latents, state = advance(state, latents, cleans[step], sigmas[step], sigmas[step + 1])
    kappas = alignment(ratio, sigmas)
    fine = grown(latents, sigmas[steps], kappas[steps])
    fine_state = unipc.grow(state, fine, grown, ratio)
    for step in (steps, steps + 1):
        clean, levels = grown(cleans[step], 0.0, ratio), (kappas * sigmas)[step : step + 2]
        latents, state = advance(state, latents, cleans[step], sigmas[step], sigmas[step + 1])
        fine, fine_state = advance(fine_state, fine, clean, *levels)
        assert relative(fine, grown(latents, sigmas[step + 1], kappas[step + 1])) <= 1e-5


def test_a_schedule_that_starts_at_pure_noise_is_survived():
    latents = jnp.ones(SHAPE)
    state = unipc.init(latents)
    for sigma, next_sigma in pairwise(flow_match_sigmas({}, 4, tokens=0)):
        latents, state = unipc.step(state, latents, -latents, sigma, next_sigma)
    assert np.isfinite(np.asarray(latents)).all()


OFFICIAL = config_of(tiny.wan_scheduler())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prediction_type": "epsilon"}, "epsilon"),
        ({"prediction_type": None}, "prediction_type"),
        ({"use_flow_sigmas": False}, "use_flow_sigmas false"),
        ({"solver_order": 3}, "solver_order 3"),
        ({"solver_type": "bh1"}, "bh1"),
        ({"predict_x0": False}, "predict_x0"),
        ({"final_sigmas_type": "sigma_min"}, "sigma_min"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"disable_corrector": [0]}, "disable_corrector"),
        ({"thresholding": True}, "thresholding"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting"),
    ],
)
def test_another_unipc_is_refused_by_name(change, says):
    default_sigmas(OFFICIAL, 4)
    with pytest.raises(UsageError, match=says):
        default_sigmas({**OFFICIAL, **change}, 4)


@pytest.mark.parametrize("scheduler", [tiny.wan_scheduler(3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)])
def test_flow_shift_replaces_the_checkpoints(scheduler):
    config = config_of(scheduler)
    assert override_shift(config, None) == config
    shifted = default_sigmas(override_shift(config, 5.0), 20)
    key = "flow_shift" if isinstance(scheduler, UniPCMultistepScheduler) else "shift"
    np.testing.assert_array_equal(shifted, default_sigmas({**config, key: 5.0}, 20))
    assert (shifted[1:-1] > default_sigmas(config, 20)[1:-1]).all()


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan"), float("inf")])
def test_a_flow_shift_must_be_positive(shift):
    with pytest.raises(UsageError, match="above 0"):
        override_shift(OFFICIAL, shift)


def test_a_shift_that_follows_the_size_is_replaced_by_one_that_does_not():
    dynamic = {"use_dynamic_shifting": True, "shift_terminal": 0.02, "max_shift": 0.9}
    levels = [flow_match_sigmas(override_shift(dynamic, 3.0), 4, tokens) for tokens in (256, 4096)]
    np.testing.assert_array_equal(*levels)
    np.testing.assert_allclose(levels[0], [1, 0.9, 0.75, 0.5, 0], atol=1e-6)


def test_a_checkpoint_names_its_solver():
    assert default_solver(OFFICIAL) == "unipc"
    assert default_solver(config_of(FlowMatchEulerDiscreteScheduler())) == "euler"
    with pytest.raises(UsageError, match="DDIMScheduler"):
        default_solver({"_class_name": "DDIMScheduler"})
