"""Noise levels, Euler's steps and the noise itself."""

import itertools

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from jaxspd.errors import UsageError
from jaxspd.sampling.noise import gaussian, stage_noises
from jaxspd.sampling.schedule import UNSUPPORTED, dynamic_shift, flow_match_sigmas
from jaxspd.sampling.solvers import euler
from tests.compare import relative

DEV = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
CONFIGS = {
    "dev": DEV,
    "dynamic, other shifts": {**DEV, "base_shift": 0.4, "max_shift": 0.9, "max_image_seq_len": 8192},
    "dynamic, linear": {**DEV, "time_shift_type": "linear"},
    "dynamic, exponential by name": {**DEV, "time_shift_type": "exponential"},
    "dynamic, all else by default": {"use_dynamic_shifting": True},
    "static 3": {"shift": 3.0, "use_dynamic_shifting": False},
    "schnell": {"shift": 1.0, "use_dynamic_shifting": False},
    "all by default": {},
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def diffusers_schedule(config, steps, tokens):
    """diffusers' scheduler with its time steps set as FluxPipeline sets them."""
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    known = scheduler.config
    shift = calculate_shift(
        tokens,
        known.base_image_seq_len,
        known.max_image_seq_len,
        known.base_shift,
        known.max_shift,
    )
    retrieve_timesteps(scheduler, sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift)
    return scheduler


# 256 and 4096 tokens are the ends of the dynamic shift's line; beyond them it goes on.
@configs
@pytest.mark.parametrize("tokens", [96, 256, 1536, 4096, 9216])
@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_sigmas_are_diffusers(config, tokens, steps):
    ours = flow_match_sigmas(config, steps, tokens)
    theirs = diffusers_schedule(config, steps, tokens).sigmas.numpy()
    chex.assert_shape(ours, (steps + 1,))
    assert ours.dtype == np.float32
    assert (ours[0], ours[-1]) == (1, 0)
    chex.assert_trees_all_close(ours, theirs, rtol=0, atol=1e-6)


def test_dynamic_shift_is_the_pipelines():
    for tokens in (0, 256, 1000, 4096, 16384):
        theirs = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
        assert dynamic_shift(DEV, tokens) == pytest.approx(theirs, rel=1e-12)


@configs
def test_euler_is_the_schedulers_step_over_a_whole_schedule(config):
    steps, tokens, shape = 28, 1536, (2, 4, 6, 10)
    scheduler = diffusers_schedule(config, steps, tokens)
    sigmas = flow_match_sigmas(config, steps, tokens)
    draw = np.random.default_rng(0)
    start = draw.standard_normal(shape, dtype=np.float32)
    ours, theirs = jnp.asarray(start), torch.from_numpy(start.copy())
    state = euler.init(ours)
    for timestep, (sigma, next_sigma) in zip(scheduler.timesteps, itertools.pairwise(sigmas), strict=True):
        velocity = draw.standard_normal(shape, dtype=np.float32)
        theirs = scheduler.step(torch.from_numpy(velocity), timestep, theirs).prev_sample
        ours, state = euler.step(state, ours, velocity, sigma, next_sigma)
        assert relative(ours, theirs) <= 1e-6


def test_euler_with_the_true_velocity_lands_on_the_picture():
    clean, noise = (np.random.default_rng(seed).standard_normal((4, 4)) for seed in (0, 1))
    x = jnp.asarray(noise, jnp.float32)
    for sigma, next_sigma in itertools.pairwise(flow_match_sigmas(DEV, 7, 4096)):
        x, _ = euler.step((), x, jnp.asarray(noise - clean, jnp.float32), sigma, next_sigma)
    assert relative(x, clean) <= 1e-6


@pytest.mark.parametrize("option", UNSUPPORTED)
def test_an_unsupported_schedule_is_refused_by_name(option):
    with pytest.raises(UsageError) as error:
        flow_match_sigmas({**DEV, option: True}, 4, 4096)
    assert option in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    # Switched off, as save_pretrained writes it, it asks for nothing.
    off = flow_match_sigmas({**DEV, option: False}, 4, 4096)
    np.testing.assert_array_equal(off, flow_match_sigmas(DEV, 4, 4096))


# Not merely each name of our own list: each option that bends diffusers' schedule.
@pytest.mark.parametrize(
    "bend",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"invert_sigmas": True},
        {"shift_terminal": 0.02},
    ],
    ids=lambda bend: next(iter(bend)),
)
def test_no_option_is_passed_over_in_silence(bend):
    config, steps, tokens = {**DEV, **bend}, 12, 4096
    theirs = diffusers_schedule(config, steps, tokens).sigmas.numpy()
    assert not np.allclose(theirs, flow_match_sigmas(DEV, steps, tokens), atol=1e-3)
    try:
        ours = flow_match_sigmas(config, steps, tokens)
    except UsageError as error:
        assert next(iter(bend)) in str(error)  # noqa: PT017  (refusing and honouring are both right)
    else:
        chex.assert_trees_all_close(ours, theirs, rtol=0, atol=1e-6)


def test_an_unknown_kind_of_time_shift_is_refused():
    with pytest.raises(UsageError, match="time_shift_type"):
        flow_match_sigmas({**DEV, "time_shift_type": "cosine"}, 4, 4096)


@pytest.mark.parametrize("steps", [0, -3])
def test_fewer_than_one_step_is_refused(steps):
    with pytest.raises(UsageError, match=f"1 or more, not {steps}"):
        flow_match_sigmas(DEV, steps, 4096)


# Noise

GRIDS = [(4, 6), (8, 12), (16, 24)]


def test_noise_repeats_itself():
    chex.assert_trees_all_equal(stage_noises([3, 4], (4,), GRIDS), stage_noises([3, 4], (4,), GRIDS))


def test_noise_has_a_stages_shape_and_is_float32():
    for noise, grid in zip(stage_noises([3, 4, 5], (4,), GRIDS), GRIDS, strict=True):
        chex.assert_shape(noise, (3, 4, *grid))
        assert noise.dtype == np.float32


def test_a_pictures_noise_does_not_depend_on_its_batch():
    alone = stage_noises([7], (4,), GRIDS)
    beside = stage_noises([7, 9, 1], (4,), GRIDS)
    elsewhere = stage_noises([9, 7], (4,), GRIDS)
    for stage in range(len(GRIDS)):
        np.testing.assert_array_equal(alone[stage][0], beside[stage][0])
        np.testing.assert_array_equal(alone[stage][0], elsewhere[stage][1])


def test_a_stages_noise_does_not_depend_on_the_stages_beside_it():
    np.testing.assert_array_equal(
        stage_noises([7], (4,), GRIDS)[1], stage_noises([7], (4,), [(2, 2), GRIDS[1]])[1]
    )


def test_seeds_and_stages_have_noise_of_their_own():
    shape = (16, 64, 64)
    draws = [gaussian(seed, stage, shape) for seed in (0, 1, 2**40) for stage in (0, 1, 2)]
    # 65,536 values: a chance correlation has a standard error of 0.004; the bound is five of them.
    for a, b in itertools.combinations(draws, 2):
        assert abs((a * b).mean()) < 0.02


def test_noise_is_standard_normal():
    # 262,144 values: the moments' standard errors are 0.002, 0.003, 0.005 and 0.019; the bounds are
    # five of them.
    noise = gaussian(42, 0, (64, 64, 64)).astype(np.float64)
    moments = [(noise**k).mean() for k in (1, 2, 3, 4)]
    for moment, expected, bound in zip(moments, (0, 1, 0, 3), (0.01, 0.015, 0.04, 0.1), strict=True):
        assert abs(moment - expected) < bound
