"""The quality study's measures of pictures, and their uncertainty.

Pictures are `[N, H, W, 3]`, uint8.
"""

from dataclasses import dataclass

import numpy as np
from scipy.fft import dctn
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from training.attributes import detect
from training.landscapes import Scene

ATTRIBUTES = ("time", "ground", "snow")
# Measures of a set that are too large for few pictures.
BIASED = ("frechet", "spectrum")
LUMINANCE = np.array([0.2126, 0.7152, 0.0722], np.float32)


def attributes_found(pictures: np.ndarray, scenes: list[Scene]) -> np.ndarray:
    """For each picture whether it shows all that its prompt asks for, `[N]`, by `training/attributes.py`."""
    found = detect(np.asarray(pictures))
    return np.array(
        [
            all(getattr(seen, name) == getattr(asked, name) for name in ATTRIBUTES)
            for seen, asked in zip(found, scenes, strict=True)
        ]
    )


def psnr(pictures: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """The peak signal-to-noise ratio of each picture to its original, `[N]`, in dB."""
    pairs = zip(pictures, originals, strict=True)
    return np.array([peak_signal_noise_ratio(b, a) for a, b in pairs])


def ssim(pictures: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """The structural similarity of each picture to its original, `[N]`, as Wang et al. (2004) define it."""
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(pictures, originals, strict=True)
    return np.array([structural_similarity(b, a, channel_axis=-1, **window) for a, b in pairs])


# Power spectra

BANDS = 24


def power_spectra(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The power of each picture's luminance in each coefficient of the orthonormal DCT.

    Returns the coefficients' frequencies `[H, W]` in cycles per image, and the powers `[N, H, W]`.
    """
    height, width = pictures.shape[1:3]
    omega = np.hypot(np.arange(height)[:, None], np.arange(width)) / 2
    power = [dctn(picture.astype(np.float32) @ LUMINANCE / 255, norm="ortho") ** 2 for picture in pictures]
    return omega, np.array(power)


def band_powers(pictures: np.ndarray) -> np.ndarray:
    """The power of each picture's luminance in bands of frequency, `[N, bands]`.

    Coefficients of `power_spectra` are averaged in bands of equal width in log ω, from 1 to the Nyquist
    frequency. Bands without a coefficient are left out.
    """
    omega, spectra = power_spectra(pictures)
    edges = np.geomspace(1, min(omega.shape) / 2, BANDS + 1)
    band = np.digitize(omega, edges) - 1
    inside = (band >= 0) & (band < BANDS)
    count = np.bincount(band[inside], minlength=BANDS)
    powers = np.array([np.bincount(band[inside], one[inside], BANDS) for one in spectra])
    return powers[:, count > 0] / count[count > 0]


def spectrum_distance(power: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The root mean square, over bands, of the difference of mean powers `[…, bands]` in dB: `[…]`."""
    return np.sqrt(((10 * np.log10(power / reference)) ** 2).mean(-1))


# Fréchet distance

LEVELS, COLOURS = 5, 16


@dataclass(frozen=True)
class Features:
    """A picture's features for the Fréchet distance. They need no network and no download.

    Colour features are the means over a grid of 8×8 blocks, reduced to their first 16 principal components.
    Texture features are the log energies of five levels of a pyramid of the luminance, in the upper, middle
    and lower third of the picture. A level is what a mean over 2×2 pixels leaves out, and the next level
    divides these means. Components and scales come from the reference pictures, where each feature has mean 0
    and variance 1.
    """

    colour_mean: np.ndarray
    components: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def fit(cls, reference: np.ndarray) -> "Features":
        """The features whose components and scales fit the pictures `reference` `[N, H, W, 3]`."""
        colours = block_colours(reference)
        mean = colours.mean(0)
        components = np.linalg.svd(colours - mean, full_matrices=False)[2][:COLOURS].T
        raw = np.concatenate([(colours - mean) @ components, textures(reference)], 1)
        return cls(mean, components, raw.mean(0), raw.std(0))

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """The features `[N, 31]` of `pictures` `[N, H, W, 3]`."""
        colours = (block_colours(pictures) - self.colour_mean) @ self.components
        return (np.concatenate([colours, textures(pictures)], 1) - self.mean) / self.deviation


def block_colours(pictures: np.ndarray) -> np.ndarray:
    """The mean colours of a grid of 8×8 blocks, `[N, 192]`."""
    n, height, width, _ = pictures.shape
    blocks = np.asarray(pictures, np.float32).reshape(n, 8, height // 8, 8, width // 8, 3)
    return blocks.mean((2, 4)).reshape(n, -1) / 255


def textures(pictures: np.ndarray) -> np.ndarray:
    """The log energies of the pyramid's levels in the pictures' thirds, `[N, 15]`."""
    sharp, energies = np.asarray(pictures, np.float32) @ LUMINANCE / 255, []
    for _ in range(LEVELS):
        n, height, width = sharp.shape
        coarse = sharp.reshape(n, height // 2, 2, width // 2, 2).mean((2, 4))
        detail = sharp - coarse.repeat(2, 1).repeat(2, 2)
        # Half a grey level is added, since smaller details cannot be seen.
        energies += [
            np.log((third**2).mean((1, 2)) + (0.5 / 255) ** 2) for third in np.array_split(detail, 3, 1)
        ]
        sharp = coarse
    return np.stack(energies, 1)


def frechet(mean: np.ndarray, covariance: np.ndarray, other_mean, other_covariance) -> np.ndarray:
    """The Fréchet distances `[…]` of Gaussians with means `[…, D]` and covariances `[…, D, D]` to another.

    They are `|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2·(Σ₁Σ₂)^½)` (Heusel et al. 2017). The trace of the root is computed
    from the eigenvalues of the symmetric `Σ₂^½ Σ₁ Σ₂^½`.
    """
    values, vectors = np.linalg.eigh(other_covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariance @ root).clip(0)).sum(-1)
    traces = np.trace(covariance, axis1=-2, axis2=-1) + np.trace(other_covariance)
    return ((mean - other_mean) ** 2).sum(-1) + traces - 2 * cross


# Statistics of a set of pictures, each counted a number of times


def resamples(n: int, count: int, seed: int = 0) -> np.ndarray:
    """How often each of `n` pictures is drawn in each of `count` bootstrap resamples, `[count, n]`.

    The first resample is the set itself, with each picture once. All cells use the same resamples, so that
    their differences are between the same pictures.
    """
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), count - 1)
    return np.concatenate([np.ones((1, n), int), drawn])


def means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The means `[R, …]` of `values` `[N, …]`, weighted by each row of `counts` `[R, N]`."""
    return np.tensordot(counts, values, 1) / counts.shape[1]


def frechet_of(features: np.ndarray, counts: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The Fréchet distances `[R]` of `features` `[N, D]`, weighted by `counts` `[R, N]`, to `reference`."""
    centre = means(features, counts)
    products = np.einsum("rn,nd,ne->rde", counts, features, features, optimize=True) / counts.shape[1]
    covariances = products - centre[:, :, None] * centre[:, None, :]
    return frechet(centre, covariances, reference.mean(0), np.cov(reference.T, bias=True))


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval. A difference is `certain` if the interval excludes 0."""

    value: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        return self.low > 0 or self.high < 0


def estimate(draws: np.ndarray, corrected: bool = False) -> Estimate:
    """The estimate of a statistic from `draws` `[R]`: its value for the set, then for the set's resamples.

    The interval is the basic bootstrap's, which is reflected about the set's own value.

    A Fréchet distance between few pictures is too large. The distance of a resample, which repeats some
    pictures, is too large by about as much again. `corrected` subtracts what resampling adds on average. In a
    paired difference most of this cancels.
    """
    low, high = np.quantile(draws[1:], [0.025, 0.975])
    own = float(draws[0])
    added = float(draws[1:].mean()) - own if corrected else 0.0
    return Estimate(own - added, float(2 * own - high), float(2 * own - low))
