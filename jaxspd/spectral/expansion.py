"""Growing noisy latents to a finer grid in the DCT basis (arXiv 2605.18736, spectral noise expansion)."""

import jax
import jax.numpy as jnp
from jax.scipy.fft import dctn, idctn

SPATIAL = (-2, -1)


def expand(latents: jax.Array, noise: jax.Array, sigma: jax.Array, kappa: jax.Array) -> jax.Array:
    """`latents` `[..., h, w]` at noise level σ on the grid of `noise` `[..., H, W]`.

    The orthonormal DCT-II coefficients become the low-frequency corner of the finer grid, whose other
    entries are σ·N(0, 1): `noise` is read as coefficients, its own corner unused. The result is scaled
    by κ (1 for plain `dct`). Float32 throughout; any H ≥ h and W ≥ w.
    """
    height, width = latents.shape[-2:]
    coefficients = dctn(jnp.asarray(latents, jnp.float32), axes=SPATIAL, norm="ortho")
    spectrum = sigma * jnp.asarray(noise, jnp.float32)
    spectrum = spectrum.at[..., :height, :width].set(coefficients)
    return kappa * idctn(spectrum, axes=SPATIAL, norm="ortho")
