"""Measuring the power spectrum of clean latents: mean power of their DCT coefficients, and its fit."""

from dataclasses import dataclass

import numpy as np
from scipy.fft import dctn

from jaxspd.errors import UsageError
from jaxspd.spectral.spectrum import Spectrum

# Latents are float32: power below this share of the strongest coefficient's is rounding error.
ROUNDING = 1e-13


@dataclass(frozen=True)
class Calibration:
    """A fitted spectrum and the ring means that it was fitted to.

    `power[n]` is the mean power of the coefficients around `omega[n]` cycles per image. Each was first
    corrected to exactly that frequency.
    """

    spectrum: Spectrum
    omega: tuple[int, ...]
    power: tuple[float, ...]


class PowerMeter:
    """The mean power of each orthonormal DCT-II coefficient over a stream of latents on one grid.

    It keeps one number for each coefficient, however long the stream is, and adds sample by sample in
    float64: the result does not depend on how the stream is cut into batches, to the last bit.
    """

    def __init__(self, grid: tuple[int, int]):
        self.samples = 0
        self._total = np.zeros(grid)

    def add(self, latents: np.ndarray) -> None:
        """Adds clean, normalised latents `[B, …, h, w]`; the axes between B and h are averaged.

        Raises UsageError unless all values are finite.
        """
        for sample in latents:
            if not np.isfinite(sample).all():
                raise UsageError("the VAE's latents are not finite; download the checkpoint again")
            planes = sample.reshape(-1, *self._total.shape).astype(np.float64)
            self._total += (dctn(planes, axes=(-2, -1), norm="ortho") ** 2).mean(0)
            self.samples += 1

    def power(self) -> np.ndarray:
        """Mean power `[h, w]`. Raises UsageError if nothing was added."""
        if not self.samples:
            raise UsageError("there is nothing to measure a spectrum on")
        return self._total / self.samples


def frequencies(grid: tuple[int, int]) -> np.ndarray:
    """ω `[h, w]` of each DCT coefficient of a grid `(h, w)`, in cycles per image (per shorter side).

    Basis function k completes k/2 cycles along its axis. Equal ω means equal wavelength in both directions,
    whatever the shape of the grid.
    """
    rows, columns = (np.arange(n) / (2 * n) for n in grid)
    return min(grid) * np.hypot(rows[:, None], columns)


def fit_spectrum(power: np.ndarray) -> Calibration:
    """Fits `P(ω) = A·ω^-β` to the mean power `[h, w]` of the coefficients of a grid.

    The coefficients are averaged in rings `n - ½ ≤ ω < n + ½`, n = 1 … min(h, w)//2. The logarithms of the
    ring means are fitted by least squares, with equal weights. Within a ring a coefficient counts as
    `P·(ω/n)^β`, the power that it would have at ω = n. So neither the ring's width nor the position of the
    grid's points in it biases the fit. This β is the fit's own, found by iteration.

    The mean is taken before the logarithm, which keeps the radial mean where directions differ. It also
    matters where samples are few: the logarithm of a noisy mean is too small on average, by about one over
    the number of values in it. With four values for each coefficient, a fit to the logarithms of single
    coefficients finds 77 % of the true A. This fit finds 97 to 101 % of it.

    Raises UsageError for a grid with fewer than two rings, and if a ring holds no power, as in pictures of
    a single colour.
    """
    omega = frequencies(power.shape)
    whole = np.arange(1, min(power.shape) // 2 + 1)
    if len(whole) < 2:
        h, w = power.shape
        raise UsageError(f"a {h}×{w} latent grid is too small to measure a spectrum on; use a larger size")
    ring = np.floor(omega + 0.5).astype(int)
    inside = (ring >= 1) & (ring <= whole[-1])
    ring, ratio, power_inside = ring[inside], omega[inside] / ring[inside], power[inside]
    count = np.bincount(ring)[1:]
    if (np.bincount(ring, power_inside)[1:] / count <= ROUNDING * power.max()).any():
        raise UsageError("the latents do not vary, as if the pictures had one colour; use other pictures")
    exponent = 0.0
    for _ in range(50):
        means = np.bincount(ring, power_inside * ratio**exponent)[1:] / count
        slope, intercept = np.polyfit(np.log(whole), np.log(means), 1)
        converged = abs(exponent + slope) < 1e-10
        exponent = -float(slope)
        if converged:
            break
    return Calibration(
        Spectrum(float(np.exp(intercept)), exponent), tuple(whole.tolist()), tuple(means.tolist())
    )
