"""The spectrum of a stream of latents: known constants are found again."""

import numpy as np
import pytest
from scipy.fft import idctn

from jaxspd.errors import UsageError
from jaxspd.families.base import FLUX1_SPECTRUM
from jaxspd.families.wan import SPECTRUM as WAN_SPECTRUM
from jaxspd.spectral.calibration import PowerMeter, fit_spectrum
from jaxspd.spectral.spectrum import Spectrum


def fields(spectrum, samples, *leading, grid, seed=0):
    """Gaussian fields `[samples, *leading, *grid]`, float32, of the power law.

    Frequencies are counted anew: basis function k of n points has wave length 2n/k, and ω is the shorter
    side over it.
    """
    rng = np.random.default_rng(seed)
    cycles = [np.arange(n) * min(grid) / (2 * n) for n in grid]
    omega = np.sqrt(cycles[0][:, None] ** 2 + cycles[1][None] ** 2)
    omega[0, 0] = 0.25  # the mean, which nothing may depend on
    scale = np.sqrt(spectrum.amplitude * omega**-spectrum.exponent)
    noise = rng.standard_normal((samples, *leading, *grid)) * scale
    return idctn(noise, axes=(-2, -1), norm="ortho").astype(np.float32)


def measure(latents, batch=8):
    meter = PowerMeter(latents.shape[-2:])
    for start in range(0, len(latents), batch):
        meter.add(latents[start : start + batch])
    return fit_spectrum(meter.power())


@pytest.mark.parametrize("spectrum", [FLUX1_SPECTRUM, WAN_SPECTRUM, Spectrum(0.5, 1.0)])
@pytest.mark.parametrize(
    ("leading", "grid"), [((16,), (32, 32)), ((16,), (24, 40)), ((16,), (40, 24)), ((4, 5), (30, 52))]
)
def test_known_constants_are_recovered(spectrum, leading, grid):
    found = measure(fields(spectrum, 48, *leading, grid=grid)).spectrum
    assert found.amplitude == pytest.approx(spectrum.amplitude, rel=0.02)
    assert found.exponent == pytest.approx(spectrum.exponent, rel=0.02)


def test_a_single_sample_is_not_biased():
    """The mean of logarithms would put A of a picture's 4 channels at 76 % of what it is."""
    found = [
        measure(fields(FLUX1_SPECTRUM, 1, 4, grid=(64, 64), seed=seed)).spectrum.amplitude
        for seed in range(20)
    ]
    assert np.mean(found) == pytest.approx(FLUX1_SPECTRUM.amplitude, rel=0.06)


def test_a_white_field_has_a_flat_spectrum():
    noise = np.random.default_rng(0).standard_normal((64, 16, 32, 32)).astype(np.float32)
    found = measure(noise)
    assert abs(found.spectrum.exponent) < 0.005
    assert found.spectrum.amplitude == pytest.approx(1, abs=0.01)
    assert found.omega == tuple(range(1, 17))
    assert np.abs(np.array(found.power) - 1).max() < 0.03


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("grid", [(32, 32), (32, 64), (48, 32)])
def test_a_wave_is_counted_at_its_frequency_in_either_direction(grid, axis):
    """Eight latents long is four cycles across 32, whichever way it runs."""
    wave = np.cos(2 * np.pi * (np.arange(grid[axis]) + 0.5) / 8)
    plane = np.broadcast_to(wave[:, None] if axis == -2 else wave, grid)
    noise = 1e-3 * np.random.default_rng(0).standard_normal(grid)
    found = measure((plane + noise)[None, None])
    assert found.omega[int(np.argmax(found.power))] == 4
    assert sorted(found.power)[-1] > 1000 * sorted(found.power)[-2]


def test_batches_change_nothing():
    latents = fields(FLUX1_SPECTRUM, 7, 4, grid=(16, 24))
    first, *others = (measure(latents, batch) for batch in (1, 3, 7))
    assert all(other == first for other in others)


def test_every_sample_channel_and_frame_counts_alike():
    latents = fields(FLUX1_SPECTRUM, 6, 4, 5, grid=(16, 24))
    flat = measure(latents.reshape(-1, 1, 16, 24))
    assert flat.power == pytest.approx(measure(latents).power, rel=1e-12)
    halves = [np.array(measure(part).power) for part in (latents[:3], latents[3:])]
    # Rings are averaged after β is known, so they agree as nearly as the three exponents do.
    assert np.mean(halves, axis=0) == pytest.approx(np.array(flat.power), rel=0.01)


@pytest.mark.parametrize(
    ("latents", "reason"),
    [
        (np.zeros((0, 4, 16, 16), np.float32), "nothing to measure"),
        (np.zeros((2, 4, 16, 16), np.float32), "do not vary"),
        (np.full((2, 4, 16, 16), 0.7, np.float32), "do not vary"),
        (np.full((2, 4, 16, 16), np.nan, np.float32), "not finite"),
        (np.ones((2, 4, 3, 16), np.float32), "3×16 latent grid is too small"),
    ],
)
def test_what_has_no_spectrum_is_refused(latents, reason):
    with pytest.raises(UsageError, match=reason) as error:
        measure(latents)
    assert len(str(error.value).splitlines()) == 1
