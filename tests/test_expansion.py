"""How the grid grows: each transform against its library, and what expansion and κ are for."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pywt
import torch
from scipy.fft import dctn, idctn

from jaxspd.spectral import expansion
from jaxspd.spectral.plan import alignment
from jaxspd.spectral.transforms import SPATIAL, TRANSFORMS, fourier, inverse_fourier
from tests.compare import relative
from torch_ref import bases
from torch_ref import spectral as reference

# Everything has batch 2 and 3 channels, so that each pair of grids compiles once.
expand = jax.jit(expansion.expand, static_argnames="transform")
share = jax.jit(expansion.share, static_argnames=("grids", "transform"))
LEADING = (2, 3)
GRIDS = {
    "2": ((6, 10), (12, 20)),
    "1.5": ((8, 6), (12, 9)),
    "odd to even": ((7, 9), (12, 16)),
    "even to odd": ((6, 10), (11, 17)),
    "one axis": ((5, 8), (5, 12)),
}
CASES = {
    f"{name}, {transform}": (transform, *grid)
    for name, grid in GRIDS.items()
    for transform in TRANSFORMS
    if transform != "dwt" or name == "2"
}
cases = pytest.mark.parametrize(("transform", "coarse", "fine"), CASES.values(), ids=CASES)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# Against SciPy, NumPy and PyWavelets, in float64


@pytest.mark.parametrize(("ours", "theirs"), [("analyse", dctn), ("synthesise", idctn)])
@pytest.mark.parametrize("shape", [(2, 1, 7, 17), (1, 2, 64, 48)])
def test_dct_is_scipys(shape, ours, theirs):
    x = normal(*shape)
    exact = theirs(x.astype(np.float64), axes=SPATIAL, norm="ortho")
    assert relative(jax.jit(getattr(TRANSFORMS["dct"], ours))(x), exact) <= 1e-6


def by_dct(latents, noise, sigma):
    """Expansion by SciPy."""
    height, width = latents.shape[-2:]
    coefficients = sigma * noise
    coefficients[..., :height, :width] = dctn(latents, axes=SPATIAL, norm="ortho")
    return idctn(coefficients, axes=SPATIAL, norm="ortho")


def by_fft(latents, noise, sigma):
    """Expansion by NumPy's complex FFT: white noise whose low frequencies are replaced."""
    field = sigma * inverse_fourier64(noise)
    for x, sign in ((latents, 1), (sigma * low_frequencies(noise, latents.shape), -1)):
        field = field + sign * embedded(x, noise.shape[-2:])
    return field


def low_frequencies(noise, shape):
    """What of the noise's coefficients the corner holds, as a field on the coarse grid."""
    return inverse_fourier64(noise[..., : shape[-2], : shape[-1]])


def inverse_fourier64(coefficients):
    """The field of real Fourier coefficients, wave by wave."""
    rows, columns = (bases.real_waves(n).numpy() for n in coefficients.shape[-2:])
    return rows.T @ coefficients @ columns


def embedded(x, size):
    """`x` on the finer grid of `size`, by zero padding of its complex spectrum, axis by axis."""
    for axis, fine in zip(SPATIAL, size, strict=True):
        coarse = x.shape[axis]
        waves = np.fft.fft(np.moveaxis(x, axis, -1), norm="ortho")
        padded = np.zeros((*waves.shape[:-1], fine), complex)
        for k in range(-((coarse - 1) // 2), (coarse - 1) // 2 + 1):
            # Half a coarse cell back to the corner, half a fine one on to the centre.
            padded[..., k] = waves[..., k] * np.exp(1j * np.pi * k * (1 / fine - 1 / coarse))
        if coarse % 2 == 0:
            # Nyquist's single wave becomes a conjugate pair of the same energy.
            k = coarse // 2
            half = waves[..., k] * np.exp(1j * np.pi * k * (1 / fine - 1 / coarse))
            if fine == coarse:
                padded[..., k] = waves[..., k]
            else:
                padded[..., k], padded[..., -k] = half / np.sqrt(2), half.conj() / np.sqrt(2)
        back = np.fft.ifft(padded, norm="ortho")
        np.testing.assert_allclose(back.imag, 0, atol=1e-12)
        x = np.moveaxis(back.real, -1, axis)
    return x


def by_dwt(latents, noise, sigma):
    """Expansion by PyWavelets."""
    height, width = latents.shape[-2:]
    noise = sigma * noise
    details = noise[..., height:, :width], noise[..., :height, width:], noise[..., height:, width:]
    return pywt.idwt2((latents, details), "haar")


BY_LIBRARY = {"dct": by_dct, "fft": by_fft, "dwt": by_dwt}


@cases
def test_expansion_is_the_librarys(transform, coarse, fine):
    latents, noise = normal(*LEADING, *coarse), normal(*LEADING, *fine, seed=1)
    expanded = expand(latents, noise, 0.7, 1.2, transform=transform)
    chex.assert_shape(expanded, (*LEADING, *fine))
    assert expanded.dtype == jnp.float32
    exact = 1.2 * BY_LIBRARY[transform](latents.astype(np.float64), noise.astype(np.float64), 0.7)
    assert relative(expanded, exact) <= 1e-6


@cases
def test_the_reference_expands_alike(transform, coarse, fine):
    latents, noise = normal(*LEADING, *coarse), normal(*LEADING, *fine, seed=1)
    theirs = reference.expand(torch.from_numpy(latents), torch.from_numpy(noise), 0.7, transform)
    exact = BY_LIBRARY[transform](latents.astype(np.float64), noise.astype(np.float64), 0.7)
    assert relative(theirs, exact) <= 1e-6


@pytest.mark.parametrize("size", [(7, 10), (8, 9), (1, 2), (16, 12)])
def test_fourier_coefficients_are_numpys(size):
    x = normal(2, *size)
    coefficients = np.asarray(jax.jit(fourier)(x))
    assert relative(jax.jit(inverse_fourier)(coefficients), x) <= 1e-6
    # The power of each pair of frequencies; a sine and its cosine have one together.
    theirs, ours = np.abs(np.fft.fft2(x.astype(np.float64), norm="ortho")) ** 2, coefficients**2
    for axis, n in zip(SPATIAL, size, strict=True):
        theirs = by_frequency(theirs, axis, [min(k, n - k) for k in range(n)])
        ours = by_frequency(ours, axis, [(k + 1) // 2 for k in range(n)])
    assert relative(ours, theirs) <= 1e-6


def by_frequency(power, axis, frequencies):
    """`power` summed over entries of the same frequency."""
    members = [np.flatnonzero(np.equal(frequencies, k)) for k in range(max(frequencies) + 1)]
    return np.stack([np.take(power, entries, axis).sum(axis) for entries in members], axis)


@cases
def test_white_noise_stays_white(transform, coarse, fine):
    """Exactly: the map from independent N(0, 1) to the field, as a matrix, has orthonormal columns."""
    few, many = math.prod(coarse), math.prod(fine)
    latents = np.concatenate([np.eye(few), np.zeros((many, few))]).reshape(-1, *coarse)
    noise = np.concatenate([np.zeros((few, many)), np.eye(many)]).reshape(-1, *fine)
    matrix = np.asarray(expand(latents, noise, 1.0, 1.0, transform=transform)).reshape(few + many, many)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(many), rtol=0, atol=2e-6)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_drawn_noise_has_the_variance_and_no_correlation(transform):
    # 73,728 or more values: standard errors are 0.004 and 0.005; the bounds are five of them.
    fine = 32 if transform == "dwt" else 24
    drawn = normal(64, 2, 16, 16), normal(64, 2, fine, fine, seed=1)
    expanded = np.asarray(expand(*drawn, 1.0, 1.0, transform=transform))
    assert abs(expanded.mean()) < 0.02
    assert abs(expanded.var() - 1) < 0.026
    assert abs((expanded[..., 1:] * expanded[..., :-1]).mean()) < 0.02


def test_expansion_is_float32_whatever_it_is_given():
    coarse, fine = GRIDS["2"]
    latents = jnp.asarray(normal(*LEADING, *coarse), jnp.bfloat16)
    noise = jnp.asarray(normal(*LEADING, *fine, seed=1), jnp.bfloat16)
    wide = expand(latents.astype(jnp.float32), noise.astype(jnp.float32), 0.7, 1.2)
    chex.assert_trees_all_equal(expand(latents, noise, 0.7, 1.2), wide)


@cases
def test_noise_beneath_the_latents_is_not_read(transform, coarse, fine):
    latents, noise = normal(*LEADING, *coarse), normal(*LEADING, *fine, seed=1)
    other = noise.copy()
    other[..., : coarse[0], : coarse[1]] = normal(*LEADING, *coarse, seed=2)
    one, same = (expand(latents, n, 0.7, 1.0, transform=transform) for n in (noise, other))
    chex.assert_trees_all_equal(one, same)


# What expansion and κ are for


def band_limited(transform, grid):
    """One smooth picture sampled on any grid, in the basis: at most 2 rows' by 2 columns' waves of it."""
    rows, columns = ((np.arange(n) + 0.5) / n for n in grid)
    if transform == "dwt":  # constant on 2×2 blocks of the finer grid
        picture = normal(6, 10)
        picture = picture.repeat(grid[0] // 6, 0).repeat(grid[1] // 10, 1)
    elif transform == "fft":  # periodic, and with a phase: neither even nor odd
        wave = np.cos(4 * np.pi * rows + 0.3)[:, None] * np.cos(4 * np.pi * columns - 0.7)
        picture = 0.8 + wave - 0.5 * np.sin(2 * np.pi * rows)[:, None]
    else:
        wave = np.cos(2 * np.pi * rows)[:, None] * np.cos(3 * np.pi * columns)
        picture = 0.8 + wave - 0.5 * np.cos(np.pi * rows)[:, None]
    return np.broadcast_to(picture, (*LEADING, *grid))


@cases
def test_expanding_without_noise_resamples_the_picture_and_shrinks_it(transform, coarse, fine):
    # The same energy over more coefficients: weaker by the root of how many times more there are,
    # which is the ratio itself where both axes grow by it.
    shrunk = math.sqrt(math.prod(coarse) / math.prod(fine))
    picture = band_limited(transform, coarse).astype(np.float32)
    expanded = expand(picture, normal(*LEADING, *fine), 0.0, 1.0, transform=transform)
    assert relative(expanded, shrunk * band_limited(transform, fine)) <= 1e-6


@pytest.mark.parametrize("sigma", [0.05, 0.7, 1.0])
@cases
def test_kappa_puts_the_expanded_latents_back_on_the_schedule(transform, coarse, fine, sigma):
    epsilon, noise = normal(*LEADING, *coarse), normal(*LEADING, *fine, seed=1)
    picture = band_limited(transform, coarse)
    latents = ((1 - sigma) * picture + sigma * epsilon).astype(np.float32)
    kappa = alignment(math.sqrt(math.prod(fine) / math.prod(coarse)), sigma)
    aligned = kappa * sigma
    # The fine grid's ε has the coarse one's coefficients below and fresh ones above.
    fine_epsilon = BY_LIBRARY[transform](epsilon.astype(np.float64), noise.astype(np.float64), 1.0)
    expected = (1 - aligned) * band_limited(transform, fine) + aligned * fine_epsilon
    assert relative(expand(latents, noise, sigma, kappa, transform=transform), expected) <= 1e-6


def test_alignment_of_pure_noise_changes_nothing_and_of_a_clean_picture_is_the_ratio():
    assert alignment(1.5, 1.0) == 1
    assert alignment(1.5, 0.0) == 1.5
    assert alignment(2.0, 0.5) == pytest.approx(2 / 1.5, rel=1e-15)


# One noise for all stages

# Coarsest first, each growing into the next.
LADDERS = {
    "halvings": ((3, 5), (6, 10), (12, 20)),
    "any ratio, odd": ((5, 7), (8, 9), (12, 16)),
}
shared_cases = pytest.mark.parametrize(
    ("transform", "grids"),
    [
        (transform, grids)
        for transform in TRANSFORMS
        for name, grids in LADDERS.items()
        if transform != "dwt" or name == "halvings"
    ],
)


@shared_cases
def test_shared_noise_grows_back_into_itself(transform, grids):
    """Pure noise that grows at σ = 1 ends as the field that all stages share parts of."""
    noise = normal(*LEADING, *grids[-1])
    latents, *later = share(noise, grids, transform)
    for part, grid in zip(later, grids[1:], strict=True):
        chex.assert_shape(part, (*LEADING, *grid))
        latents = expand(latents, part, 1.0, 1.0, transform=transform)
    assert relative(latents, noise) <= 1e-6


@shared_cases
def test_shared_noise_is_white_on_the_first_grid(transform, grids):
    """Exactly: its rows as functions of the field are orthonormal."""
    many = math.prod(grids[-1])
    field = np.eye(many, dtype=np.float32).reshape(many, *grids[-1])
    first = np.asarray(share(field, grids, transform)[0]).reshape(many, -1)
    np.testing.assert_allclose(first.T @ first, np.eye(first.shape[1]), rtol=0, atol=2e-6)


@shared_cases
def test_the_reference_shares_noise_alike(transform, grids):
    noise = normal(*LEADING, *grids[-1])
    theirs = reference.share(torch.from_numpy(noise), grids, transform)
    for ours, expected in zip(share(noise, grids, transform), theirs, strict=True):
        assert relative(ours, expected) <= 1e-6


def test_shared_noise_is_scipys_and_pywavelets():
    noise = normal(*LEADING, 12, 20)
    coarse, fine = share(noise, ((7, 9), (12, 20)))
    exact = dctn(noise.astype(np.float64), axes=SPATIAL, norm="ortho")
    assert relative(fine, exact) <= 1e-6
    assert relative(coarse, idctn(exact[..., :7, :9], axes=SPATIAL, norm="ortho")) <= 1e-6
    low, details = pywt.dwt2(noise.astype(np.float64), "haar")
    coarse, fine = share(noise, ((6, 10), (12, 20)), "dwt")
    assert relative(coarse, low) <= 1e-6
    assert relative(fine, np.block([[low, details[1]], [details[0], details[2]]])) <= 1e-6
