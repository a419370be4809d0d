"""The orthonormal bases in which latents grow, all over the last two axes (arXiv 2605.18736).

In each basis, the coefficients of an h×w grid are the corner `[:h, :w]` of any finer grid's coefficients: the
functions are the same, sampled at more points. White noise has white coefficients, and white coefficients
make white noise.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.fft import dctn, idctn

from jaxspd.errors import UsageError
from jaxspd.spectral.levels import Level

SPATIAL = (-2, -1)


class Transform(NamedTuple):
    """A basis of latents `[..., H, W]`.

    `analyse` gives the latents' coefficients, and `synthesise` is its inverse. `corner` gives the
    coefficients that latents `[..., h, w]` have in the corner `[:h, :w]` of a finer grid, and `from_corner`
    is its inverse. `ratio` is the only ratio of the two grids that the basis can make, or None if it can make
    any.
    """

    analyse: Callable[[jax.Array], jax.Array]
    synthesise: Callable[[jax.Array], jax.Array]
    corner: Callable[[jax.Array], jax.Array]
    from_corner: Callable[[jax.Array], jax.Array]
    ratio: int | None = None


def fourier(x: jax.Array) -> jax.Array:
    """Real Fourier coefficients `[..., h, w]` of `x` `[..., h, w]`, orthonormal.

    Along each axis the coefficients are those of 1, sin 1, cos 1, sin 2, cos 2, …. The samples lie at the
    centres of the grid's cells, so a picture stays in its place when the grid grows. On an even axis the last
    coefficient is the Nyquist frequency's, which has a sine alone. On a finer grid that sine is known, and
    its cosine is noise. So the result is real, and white noise stays white, on odd and even grids.
    """
    return _fourier(_fourier(x).mT).mT


def inverse_fourier(coefficients: jax.Array) -> jax.Array:
    """The array that has these `fourier` coefficients, same shape."""
    return _inverse_fourier(_inverse_fourier(coefficients).mT).mT


def _half_cell(size: int) -> jax.Array:
    """Phases that move each wave's origin from the first cell's centre, as in an FFT, to the axis's start."""
    return jnp.exp(-1j * jnp.pi * jnp.arange(size // 2 + 1) / size).astype(jnp.complex64)


def _fourier(x: jax.Array) -> jax.Array:
    """`fourier` of the last axis."""
    size = x.shape[-1]
    waves = jnp.fft.rfft(x, norm="ortho") * _half_cell(size) * _weights(size)
    pairs = jnp.stack([-waves.imag, waves.real], -1).reshape(*x.shape[:-1], -1)
    return pairs[..., 1 : size + 1]  # without the sine of 0 and, on an even axis, the cosine of Nyquist


def _inverse_fourier(coefficients: jax.Array) -> jax.Array:
    """`inverse_fourier` of the last axis."""
    size = coefficients.shape[-1]
    ends = [(0, 0)] * (coefficients.ndim - 1) + [(1, 1 - size % 2)]
    pairs = jnp.pad(coefficients, ends).reshape(*coefficients.shape[:-1], -1, 2)
    waves = jax.lax.complex(pairs[..., 1], -pairs[..., 0]) * _half_cell(size).conj() / _weights(size)
    return jnp.fft.irfft(waves, size, norm="ortho")


def _weights(size: int) -> jax.Array:
    """√2 for a wave that stands for its conjugate too; 1 for frequency 0 and an even axis's Nyquist."""
    weights = jnp.full(size // 2 + 1, math.sqrt(2), jnp.float32).at[0].set(1)
    return weights if size % 2 else weights.at[-1].set(1)


def haar(x: jax.Array) -> jax.Array:
    """Haar wavelet coefficients `[..., H, W]` of `x` `[..., H, W]`, one level, H and W even.

    The upper left quarter is `x` on half the grid. The upper right quarter holds differences between columns,
    the lower left between rows, and the lower right between both.
    """
    for axis in SPATIAL:
        even, odd = (jax.lax.slice_in_dim(x, start, None, 2, axis + x.ndim) for start in (0, 1))
        x = jnp.concatenate([even + odd, even - odd], axis) / math.sqrt(2)
    return x


def inverse_haar(coefficients: jax.Array) -> jax.Array:
    """The array that has these `haar` coefficients, same shape."""
    for axis in SPATIAL:
        low, high = jnp.split(coefficients, 2, axis)
        pairs = jnp.stack([low + high, low - high], axis + coefficients.ndim + 1) / math.sqrt(2)
        coefficients = pairs.reshape(coefficients.shape)
    return coefficients


def _itself(x: jax.Array) -> jax.Array:
    return x


_dct, _inverse_dct = (partial(f, axes=SPATIAL, norm="ortho") for f in (dctn, idctn))

TRANSFORMS = {
    "dct": Transform(_dct, _inverse_dct, _dct, _inverse_dct),
    "fft": Transform(fourier, inverse_fourier, fourier, inverse_fourier),
    "dwt": Transform(haar, inverse_haar, _itself, _itself, ratio=2),
}


def check_transform(name: str, levels: Sequence[Level]) -> None:
    """Raises UsageError unless the transform `name` can grow each of `levels` into the next."""
    if name not in TRANSFORMS:
        raise UsageError(f"unknown progressive transform {name!r}; use one of {', '.join(TRANSFORMS)}")
    ratio = TRANSFORMS[name].ratio
    for coarse, fine in itertools.pairwise(levels):
        grown = tuple(ratio * n for n in coarse.latent) if ratio else fine.latent
        if grown != fine.latent or (ratio and not math.isclose(fine.scale, ratio * coarse.scale)):
            small, big = ("×".join(map(str, level.latent)) for level in (coarse, fine))
            raise UsageError(
                f"{name} grows a grid to exactly {ratio} times its size, not {small} to {big}; "
                "use progressive levels, or the transform dct or fft"
            )
