"""When the grid grows and how: activation, plans, DCT, expansion."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.fft import dctn as jax_dctn
from jax.scipy.fft import idctn as jax_idctn
from scipy.fft import dctn, idctn

from jaxspd.errors import UsageError
from jaxspd.sampling.schedule import flow_match_sigmas
from jaxspd.spectral import expansion
from jaxspd.spectral.expansion import SPATIAL
from jaxspd.spectral.levels import Level, at_scales, halvings
from jaxspd.spectral.plan import alignment, make_plan
from jaxspd.spectral.spectrum import Spectrum
from tests.compare import relative

# FLUX.1-dev at 1024×1024: 128×128 latents packed into 4096 tokens, as published.
FLUX1 = Spectrum(amplitude=203.615097, exponent=1.915461)
DEV = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "shift": 3.0,
}
STEPS = 50


def tokens(latent):
    return latent[0] // 2 * (latent[1] // 2)


def flux1_plan(levels=1, mode="dct_rewind", delta=0.01, steps=STEPS):
    sigmas = flow_match_sigmas(DEV, steps, 4096)
    return make_plan(halvings((128, 128), levels), sigmas, FLUX1, mode=mode, delta=delta, tokens=tokens)


def one_line(error) -> str:
    message = str(error.value)
    assert message
    assert len(message.splitlines()) == 1
    return message


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# Activation and stage splits: the published numbers have six decimals.


@pytest.mark.parametrize(
    ("delta", "threshold", "start", "sigma", "aligned"),
    [
        (0.05, 0.718037, 28, 0.712762, 0.832296),
        (0.01, 0.852663, 18, 0.848818, 0.918228),
    ],
)
def test_flux1_changes_grid_where_published(delta, threshold, start, sigma, aligned):
    coarse, fine = halvings((128, 128), 1)
    assert (coarse.nyquist, fine.nyquist) == (32, 64)
    assert round(FLUX1.activation_time(coarse.nyquist, delta), 6) == threshold
    first, second = flux1_plan(delta=delta).stages
    assert (first.start, first.end, second.start, second.end) == (0, start, start, STEPS)
    assert round(second.sigma, 6) == sigma
    assert round(second.aligned_sigma, 6) == aligned
    assert (first.latent, first.tokens, second.latent, second.tokens) == ((64, 64), 1024, (128, 128), 4096)


@pytest.mark.parametrize(
    ("levels", "delta", "split"),
    [(1, 0.01, [18, 32]), (1, 0.05, [28, 22]), (2, 0.01, [10, 8, 32])],
)
@pytest.mark.parametrize("mode", ["dct", "dct_rewind"])
def test_flux1_splits_its_steps_as_published(levels, delta, split, mode):
    plan = flux1_plan(levels, mode, delta)
    assert [stage.steps for stage in plan.stages] == split
    assert (plan.levels, plan.steps) == (levels, STEPS)


def test_activation_falls_with_frequency_and_with_delta():
    by_frequency = [FLUX1.activation_time(omega, 0.05) for omega in (1, 4, 16, 64)]
    by_delta = [FLUX1.activation_time(32, delta) for delta in (1e-6, 0.01, 0.5, 1 - 1e-6)]
    for times in (by_frequency, by_delta):
        assert 1 > times[0] > times[1] > times[2] > times[3] > 0
    # P = 2 and δ = 1/2 make P·(1 + P - δ) = 5, so t = 1 / (1 + sqrt(1/10)).
    assert Spectrum(4.0, 1.0).power(2) == 2
    assert Spectrum(4.0, 1.0).activation_time(2, 0.5) == pytest.approx(1 / (1 + math.sqrt(0.1)), rel=1e-12)


def test_a_stage_starts_at_the_first_sigma_that_does_not_exceed_its_threshold():
    spectrum = Spectrum(4.0, 1.0)
    threshold = spectrum.activation_time(2, 0.5)
    levels = [Level((4, 4), 0.5, 2), Level((8, 8), 1.0, 4)]
    for sigma, start in ((threshold, 2), (np.nextafter(threshold, 1), 3)):
        plan = make_plan(levels, [1.0, 0.9, sigma, 0.3, 0.0], spectrum, mode="dct", delta=0.5, tokens=tokens)
        assert plan.stages[1].start == start


# Grids


def test_halving_uses_integer_division():
    levels = halvings((27, 42), 2)
    assert [level.latent for level in levels] == [(6, 10), (13, 21), (27, 42)]
    assert [level.nyquist for level in levels] == [3, 6, 13]
    assert [level.scale for level in levels] == [0.25, 0.5, 1]
    assert halvings((27, 42), 0) == [Level((27, 42), 1.0, 13)]


def test_scales_of_any_ratio_make_grids_of_any_ratio():
    levels = at_scales((96, 144), [2 / 3, 1])
    assert [level.latent for level in levels] == [(64, 96), (96, 144)]
    # Half of 2/3 of the shorter side, not rounded.
    assert [level.nyquist for level in levels] == pytest.approx([32, 48], rel=1e-12)
    levels = at_scales((50, 30), [0.3, 0.5, 1])
    assert [level.latent for level in levels] == [(15, 9), (25, 15), (50, 30)]
    assert [level.nyquist for level in levels] == pytest.approx([4.5, 7.5, 15], rel=1e-12)


def test_snapping_moves_the_grid_and_keeps_scale_and_frequency():
    # 64/3 = 21.3 snaps down and 128/3 = 42.7 up.
    levels = at_scales((64, 104), [1 / 3, 2 / 3, 1], multiple=4)
    assert [level.latent for level in levels] == [(20, 36), (44, 68), (64, 104)]
    assert [level.scale for level in levels] == [1 / 3, 2 / 3, 1]
    assert [level.nyquist for level in levels] == pytest.approx([32 / 3, 64 / 3, 32], rel=1e-12)
    # A side never vanishes: it keeps one multiple.
    assert at_scales((60, 104), [0.01, 1], multiple=4)[0].latent == (4, 4)


def test_a_plan_runs_over_general_scales():
    sigmas = flow_match_sigmas(DEV, STEPS, 4096)
    levels = at_scales((128, 128), [1 / 4, 2 / 3, 1])
    plan = make_plan(levels, sigmas, FLUX1, mode="dct_rewind", delta=0.01, tokens=tokens)
    starts = [0]
    for level in levels[:-1]:
        starts.append(int(np.argmax(sigmas <= FLUX1.activation_time(level.nyquist, 0.01))))
    assert [stage.start for stage in plan.stages] == starts
    ratios = [1, 8 / 3, 3 / 2]
    for stage, ratio in zip(plan.stages, ratios, strict=True):
        assert stage.kappa == pytest.approx(ratio / (1 + (ratio - 1) * stage.sigma), rel=1e-12)
        assert stage.aligned_sigma == pytest.approx(stage.kappa * stage.sigma, rel=1e-12)


# What modes do to the schedule


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_fullres_is_one_stage_whatever_the_levels(levels):
    (stage,) = flux1_plan(levels, mode="fullres").stages
    assert (stage.latent, stage.start, stage.end, stage.kappa) == ((128, 128), 0, STEPS, 1)
    assert stage.sigmas == tuple(map(float, flow_match_sigmas(DEV, STEPS, 4096)))


@pytest.mark.parametrize("mode", ["dct", "dct_rewind"])
def test_only_dct_rewind_touches_the_schedule_and_only_where_the_grid_grows(mode):
    schedule = [float(sigma) for sigma in flow_match_sigmas(DEV, STEPS, 4096)]
    stages = flux1_plan(2, mode).stages
    assert stages[0].kappa == 1
    assert stages[0].sigmas == tuple(schedule[: stages[0].end + 1])
    for stage in stages[1:]:
        sigma = schedule[stage.start]
        assert stage.sigma == sigma
        assert stage.sigmas[1:] == tuple(schedule[stage.start + 1 : stage.end + 1])
        if mode == "dct":
            assert stage.kappa == 1
            assert stage.aligned_sigma == sigma
        else:
            assert stage.kappa == pytest.approx(2 / (1 + sigma), rel=1e-12)
            assert stage.aligned_sigma == pytest.approx(2 * sigma / (1 + sigma), rel=1e-12)


# Refusals


@pytest.mark.parametrize("delta", [0, 1, -0.1, 1.5, math.nan])
@pytest.mark.parametrize("mode", ["fullres", "dct", "dct_rewind"])
def test_delta_outside_its_range_is_refused(delta, mode):
    with pytest.raises(UsageError) as error:
        flux1_plan(mode=mode, delta=delta)
    assert "between 0 and 1" in one_line(error)


def test_an_unknown_mode_is_refused():
    with pytest.raises(UsageError) as error:
        flux1_plan(mode="wavelet")
    message = one_line(error)
    assert all(name in message for name in ("'wavelet'", "fullres", "dct", "dct_rewind"))


def test_negative_levels_are_refused():
    with pytest.raises(UsageError) as error:
        halvings((128, 128), -1)
    assert "-1" in one_line(error)


def test_too_many_levels_are_refused_and_the_most_is_named():
    assert halvings((128, 96), 5)[0].latent == (4, 3)
    with pytest.raises(UsageError) as error:
        halvings((128, 96), 6)
    assert "use at most 5" in one_line(error)


@pytest.mark.parametrize(
    ("scales", "says"),
    [
        ([], "end in 1"),
        ([0.5], "end in 1"),
        ([0, 1], "above 0"),
        ([-0.5, 1], "above 0"),
        ([0.5, 0.5, 1], "increase"),
        ([0.75, 0.5, 1], "increase"),
        ([0.5, 0.51, 1], "same latent grid"),
    ],
)
def test_scales_that_make_no_ladder_are_refused(scales, says):
    with pytest.raises(UsageError) as error:
        at_scales((32, 32), scales)
    assert says in one_line(error)


@pytest.mark.parametrize(
    ("levels", "sigmas", "stage"),
    [
        (1, [0.5, 0.4, 0.0], "stage 1 of 2 (latent 64×64)"),  # fine enough from the start
        (2, [1.0, 0.5, 0.0], "stage 2 of 3 (latent 64×64)"),  # both thresholds in one step
        (1, [1.0, 0.99, 0.0], "stage 2 of 2 (latent 128×128)"),  # never reached
    ],
)
def test_a_stage_without_a_step_is_refused(levels, sigmas, stage):
    with pytest.raises(UsageError) as error:
        make_plan(halvings((128, 128), levels), sigmas, FLUX1, mode="dct", delta=0.05, tokens=tokens)
    assert stage in one_line(error)


def test_a_schedule_without_a_step_is_refused():
    with pytest.raises(UsageError) as error:
        make_plan(halvings((8, 8), 0), [0.0], FLUX1, mode="fullres", delta=0.5, tokens=tokens)
    assert "1 or more" in one_line(error)


# Savings


def test_savings_of_a_hand_computed_plan():
    plan = flux1_plan(2, delta=0.01)
    # 10 steps of 256 tokens, 8 of 1024 and 32 of 4096, over 50 of 4096.
    assert plan.token_step_ratio() == pytest.approx(141824 / 204800, rel=1e-12)
    assert plan.flop_speedup(float) == pytest.approx(204800 / 141824, rel=1e-12)
    # Quadratic cost: 256² and 1024² are 1/256 and 1/16 of 4096².
    assert plan.flop_speedup(lambda n: n**2) == pytest.approx(50 / (10 / 256 + 8 / 16 + 32), rel=1e-12)
    whole = flux1_plan(mode="fullres")
    assert (whole.token_step_ratio(), whole.flop_speedup(float)) == (1, 1)


# DCT and expansion against SciPy in float64. Everything has batch 2 and 3 channels, so that each pair
# of grids compiles once.

expand = jax.jit(expansion.expand)
LEADING = (2, 3)
GRIDS = {
    "2": ((6, 10), (12, 20)),
    "1.5": ((8, 6), (12, 9)),
    "awkward": ((7, 10), (12, 17)),
    "one axis": ((5, 8), (5, 12)),
}
grids = pytest.mark.parametrize(("coarse", "fine"), GRIDS.values(), ids=GRIDS)


@pytest.mark.parametrize(("ours", "theirs"), [(jax_dctn, dctn), (jax_idctn, idctn)])
@pytest.mark.parametrize("shape", [(2, 1, 7, 17), (1, 2, 64, 48)])
def test_dct_is_scipys(shape, ours, theirs):
    x = normal(*shape)
    exact = theirs(x.astype(np.float64), axes=SPATIAL, norm="ortho")
    assert relative(jax.jit(lambda a: ours(a, axes=SPATIAL, norm="ortho"))(x), exact) <= 1e-6


def expanded_in_float64(latents, noise, sigma, kappa):
    height, width = latents.shape[-2:]
    spectrum = sigma * noise.astype(np.float64)
    spectrum[..., :height, :width] = dctn(latents.astype(np.float64), axes=SPATIAL, norm="ortho")
    return kappa * idctn(spectrum, axes=SPATIAL, norm="ortho")


@grids
def test_expansion_is_the_one_computed_in_float64(coarse, fine):
    latents, noise = normal(*LEADING, *coarse), normal(*LEADING, *fine, seed=1)
    expanded = expand(latents, noise, 0.7, 1.2)
    chex.assert_shape(expanded, (*LEADING, *fine))
    assert expanded.dtype == jnp.float32
    assert relative(expanded, expanded_in_float64(latents, noise, 0.7, 1.2)) <= 1e-6


def test_expansion_is_float32_whatever_it_is_given():
    coarse, fine = GRIDS["2"]
    latents = jnp.asarray(normal(*LEADING, *coarse), jnp.bfloat16)
    noise = jnp.asarray(normal(*LEADING, *fine, seed=1), jnp.bfloat16)
    wide = expand(latents.astype(jnp.float32), noise.astype(jnp.float32), 0.7, 1.2)
    chex.assert_trees_all_equal(expand(latents, noise, 0.7, 1.2), wide)


@grids
def test_noise_beneath_the_latents_is_not_read(coarse, fine):
    latents, noise = normal(*LEADING, *coarse), normal(*LEADING, *fine, seed=1)
    other = noise.copy()
    other[..., : coarse[0], : coarse[1]] = normal(*LEADING, *coarse, seed=2)
    chex.assert_trees_all_equal(expand(latents, noise, 0.7, 1.0), expand(latents, other, 0.7, 1.0))


# What expansion and κ are for


def constant(grid):
    return np.full((*LEADING, *grid), 3.0)


def band_limited(grid):
    """The same smooth picture sampled on any grid: no frequency above 2 rows by 3 columns."""
    rows, columns = ((np.arange(n) + 0.5) / n for n in grid)
    wave = np.cos(2 * np.pi * rows)[:, None] * np.cos(3 * np.pi * columns)
    return np.broadcast_to(0.8 + wave - 0.5 * np.cos(np.pi * rows)[:, None], (*LEADING, *grid))


pictures = pytest.mark.parametrize("picture", [constant, band_limited])


@pictures
@grids
def test_expanding_without_noise_resamples_the_picture_and_shrinks_it(coarse, fine, picture):
    # The same energy over more coefficients: weaker by the root of how many times more there are,
    # which is the ratio itself where both axes grow by it.
    shrunk = math.sqrt(math.prod(coarse) / math.prod(fine))
    expanded = expand(picture(coarse).astype(np.float32), normal(*LEADING, *fine), 0.0, 1.0)
    assert relative(expanded, shrunk * picture(fine)) <= 1e-6


@pictures
@pytest.mark.parametrize("sigma", [0.05, 0.7, 1.0])
@grids
def test_kappa_puts_the_expanded_latents_back_on_the_schedule(coarse, fine, sigma, picture):
    epsilon, noise = normal(*LEADING, *coarse), normal(*LEADING, *fine, seed=1)
    latents = ((1 - sigma) * picture(coarse) + sigma * epsilon).astype(np.float32)
    kappa = alignment(math.sqrt(math.prod(fine) / math.prod(coarse)), sigma)
    aligned = kappa * sigma
    # The fine grid's ε has the coarse one's coefficients below and fresh ones above.
    fine_epsilon = expanded_in_float64(epsilon, noise, 1.0, 1.0)
    expected = (1 - aligned) * picture(fine) + aligned * fine_epsilon
    assert relative(expand(latents, noise, sigma, kappa), expected) <= 1e-6


def test_expanded_noise_stays_white():
    # At σ = 1 there is nothing but noise, and an orthonormal basis keeps it N(0, 1) and
    # uncorrelated. 73,728 values: standard errors are 0.004 and 0.005; the bounds are five of them.
    expanded = np.asarray(expand(normal(64, 2, 16, 16), normal(64, 2, 24, 24, seed=1), 1.0, 1.0))
    assert abs(expanded.mean()) < 0.02
    assert abs(expanded.var() - 1) < 0.026
    assert abs((expanded[..., 1:] * expanded[..., :-1]).mean()) < 0.02


def test_alignment_of_pure_noise_changes_nothing_and_of_a_clean_picture_is_the_ratio():
    assert alignment(1.5, 1.0) == 1
    assert alignment(1.5, 0.0) == 1.5
    assert alignment(2.0, 0.5) == pytest.approx(2 / 1.5, rel=1e-15)
