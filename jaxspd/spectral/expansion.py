"""Growing noisy latents to a finer grid (arXiv 2605.18736, spectral noise expansion)."""

import jax
import jax.numpy as jnp

from jaxspd.spectral.transforms import TRANSFORMS


def expand(
    latents: jax.Array,
    noise: jax.Array,
    sigma: jax.Array,
    kappa: jax.Array,
    transform: str = "dct",
) -> jax.Array:
    """`latents` `[..., h, w]` at noise level σ on the grid of `noise` `[..., H, W]`.

    Their coefficients in the basis `transform` become the corner of the finer grid's, whose other
    entries are σ·N(0, 1): `noise` is read as coefficients, its own corner unused. The result is scaled
    by κ (1 for plain `dct`). Float32 throughout; any H ≥ h and W ≥ w that the transform can reach.
    """
    height, width = latents.shape[-2:]
    basis = TRANSFORMS[transform]
    coefficients = sigma * jnp.asarray(noise, jnp.float32)
    known = basis.coarse(jnp.asarray(latents, jnp.float32))
    return kappa * basis.fine(coefficients.at[..., :height, :width].set(known))
