"""When the grid grows: activation, levels, plans."""

import math
from itertools import pairwise

import numpy as np
import pytest

from jaxspd.errors import UsageError
from jaxspd.sampling.schedule import flow_match_sigmas
from jaxspd.spectral.levels import Level, at_scales, halvings, parse_scales
from jaxspd.spectral.plan import make_plan, respaced
from jaxspd.spectral.spectrum import Spectrum
from tests.plans import plan_of
from torch_ref import spectral as reference

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
    return plan_of(halvings((128, 128), levels), sigmas, FLUX1, mode=mode, delta=delta, tokens=tokens)


def one_line(error) -> str:
    message = str(error.value)
    assert message
    assert len(message.splitlines()) == 1
    return message


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
        plan = plan_of(levels, [1.0, 0.9, sigma, 0.3, 0.0], spectrum, mode="dct", delta=0.5, tokens=tokens)
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
    plan = plan_of(levels, sigmas, FLUX1, mode="dct_rewind", delta=0.01, tokens=tokens)
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
        plan_of(halvings((128, 128), levels), sigmas, FLUX1, mode="dct", delta=0.05, tokens=tokens)
    assert stage in one_line(error)


def test_a_schedule_without_a_step_is_refused():
    with pytest.raises(UsageError) as error:
        plan_of(halvings((8, 8), 0), [0.0], FLUX1, mode="fullres", delta=0.5, tokens=tokens)
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


# What may be chosen otherwise than as published


def by_hand(mode="dct_rewind", thresholds=(0.75,), levels=1, schedules=None, **options):
    schedules = schedules or [[1.0, 0.9, 0.7, 0.4, 0.1, 0.0]] * (levels + 1)
    return make_plan(halvings((8, 8), levels), schedules, thresholds, mode=mode, tokens=tokens, **options)


def test_remaining_steps_are_spread_evenly_along_the_schedule():
    first, second = by_hand(respace=True).stages
    assert first.sigmas == (1.0, 0.9, 0.7)
    # κ·0.7 = 2·0.7/1.7 lies between entries 1 (0.9) and 2 (0.7); three steps go from there to entry 5.
    aligned = 1.4 / 1.7
    start = 1 + (0.9 - aligned) / 0.2
    places = [start + (5 - start) * part / 3 for part in (1, 2)]
    expected = [0.7 - 0.3 * (places[0] - 2), 0.4 - 0.3 * (places[1] - 3)]
    assert second.sigmas == pytest.approx((aligned, *expected, 0.0), rel=1e-12)
    assert (second.start, second.end, second.sigma) == (2, 5, 0.7)


def test_a_linear_schedule_stays_linear_when_it_is_spaced_anew():
    linear = [1 - i / 10 for i in range(11)]
    assert respaced(linear, 4, 0.75) == pytest.approx(np.linspace(0.75, 0, 7), abs=1e-12)
    # From where it is already, nothing moves; and the last step goes down at once.
    assert respaced(linear, 4, 0.6) == pytest.approx(linear[4:], abs=1e-12)
    assert respaced(linear, 9, 0.15) == [0.15, 0.0]


def test_the_reference_spaces_steps_alike():
    schedule = flow_match_sigmas(DEV, STEPS, 4096).astype(float).tolist()
    for start, sigma in ((1, 0.999), (18, 0.918228), (28, 0.832296), (49, 0.2)):
        ours = respaced(schedule, start, sigma)[1:]
        assert ours == pytest.approx(reference.spread(schedule[:-1], start, sigma), abs=1e-12)
        assert len(ours) == STEPS - start


def test_later_thresholds_see_the_levels_as_they_are_spaced():
    schedule = [1.0, 0.9, 0.8, 0.6, 0.5, 0.3, 0.2, 0.1, 0.0]
    plain, spaced = (
        by_hand(thresholds=(0.85, 0.4), levels=2, schedules=[schedule] * 3, respace=r) for r in (False, True)
    )
    assert [s.start for s in plain.stages] == [0, 2, 5]
    # 0.8 was aligned to 0.89, from where two steps to 0.4 and below are longer ones.
    middle = spaced.stages[1]
    assert middle.sigmas[0] == pytest.approx(1.6 / 1.8)
    assert all(s > 0.4 for s in middle.sigmas[:-1])
    assert middle.sigmas[-1] <= 0.4
    assert spaced.stages[2].sigma == middle.sigmas[-1]


def test_each_stage_may_follow_a_schedule_of_its_own():
    low, high = [1.0, 0.8, 0.5, 0.3, 0.1, 0.0], [1.0, 0.9, 0.7, 0.4, 0.2, 0.0]
    first, second = by_hand(thresholds=(0.55,), schedules=[low, high]).stages
    assert first.sigmas == (1.0, 0.8, 0.5)
    assert second.sigma == 0.5
    assert second.sigmas == pytest.approx((1 / 1.5, 0.4, 0.2, 0.0))


def test_a_stage_whose_noise_would_rise_is_refused():
    low, high = [1.0, 0.5, 0.3, 0.1, 0.0], [1.0, 0.9, 0.8, 0.7, 0.0]
    with pytest.raises(UsageError) as error:
        by_hand("dct", thresholds=(0.55,), schedules=[low, high])
    assert "start at σ 0.500 and go up to 0.800; use dct_rewind, or progressive respace" in one_line(error)
    # Spaced anew it can only fall.
    (_, second) = by_hand("dct", thresholds=(0.55,), schedules=[low, high], respace=True).stages
    assert second.sigmas[0] == 0.5
    assert all(a > b for a, b in pairwise(second.sigmas))


@pytest.mark.parametrize(
    ("texts", "scales"),
    [
        (["0.5", "1.0"], [0.5, 1]),
        (["1/3", "2/3", "1"], [1 / 3, 2 / 3, 1]),
        (["480", "720"], [2 / 3, 1]),
        (["1"], [1]),
    ],
)
def test_scales_are_read_as_decimals_fractions_and_heights(texts, scales):
    assert parse_scales(texts, 720) == pytest.approx(scales, rel=1e-15)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["480", "704"], "end in the picture's height, 720, not 704"),
        (["half", "1"], "cannot read the progressive scale 'half'"),
        (["1/0", "1"], "cannot read the progressive scale '1/0'"),
    ],
)
def test_scales_that_cannot_be_read_are_refused(texts, says):
    with pytest.raises(UsageError) as error:
        parse_scales(texts, 720)
    assert says in one_line(error)


@pytest.mark.parametrize("scales", [[1 / 3, 1], [0.5, 1]])
def test_wavelets_only_double(scales):
    # Half of 15, in even grids, is 8.
    levels = at_scales((30, 30), scales, multiple=2)
    with pytest.raises(UsageError) as error:
        make_plan(levels, [[1.0, 0.5, 0.0]] * 2, [0.7], mode="dct", transform="dwt", tokens=tokens)
    assert "to exactly 2 times its size" in one_line(error)


def test_an_unknown_transform_is_refused():
    with pytest.raises(UsageError) as error:
        by_hand(transform="dst")
    assert "unknown progressive transform 'dst'; use one of dct, fft, dwt" in one_line(error)


def test_a_spectrum_is_read_from_a_file(tmp_path):
    path = tmp_path / "spectrum.json"
    path.write_text('{"amplitude": 20, "exponent": 1.5, "files": 3}')
    assert Spectrum.from_file(path) == Spectrum(20.0, 1.5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot read a spectrum from"),
        ("[1, 2]", "needs a positive number as amplitude, and has none"),
        ('{"amplitude": 20}', "needs a positive number as exponent, and has none"),
        ('{"amplitude": 0, "exponent": 1}', "as amplitude, and has 0"),
        ('{"amplitude": 1, "exponent": NaN}', "NaN is no number in JSON"),
        ('{"amplitude": 1, "exponent": -1.5}', "as exponent, and has -1.5"),
        ('{"amplitude": "1", "exponent": 1}', 'as amplitude, and has "1"'),
        ('{"amplitude": true, "exponent": 2}', "as amplitude, and has true"),
        ('{"amplitude": 1' + 400 * "0" + ', "exponent": 2}', "as amplitude, and has 1000"),
    ],
)
def test_a_file_without_a_spectrum_is_refused(tmp_path, text, says):
    path = tmp_path / "spectrum.json"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        Spectrum.from_file(path)
    assert says in one_line(error)
