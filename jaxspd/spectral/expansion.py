"""Growing noisy latents to a finer grid (arXiv 2605.18736, spectral noise expansion)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

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
    """Grows `latents` `[..., h, w]` at noise level σ to the grid of `noise` `[..., H, W]`, float32.

    The coefficients of `latents` in the basis `transform` become the corner `[:h, :w]` of the finer grid's
    coefficients. The others are σ·`noise`: `noise` is N(0, 1) and read as coefficients, and its own corner
    is not used. The result is scaled by κ (1 for plain `dct`). H ≥ h and W ≥ w are any that the transform
    can reach.
    """
    height, width = latents.shape[-2:]
    basis = TRANSFORMS[transform]
    coefficients = sigma * jnp.asarray(noise, jnp.float32)
    known = basis.corner(jnp.asarray(latents, jnp.float32))
    return kappa * basis.synthesise(coefficients.at[..., :height, :width].set(known))


def share(noise: jax.Array, grids: Sequence[tuple[int, int]], transform: str = "dct") -> list[jax.Array]:
    """Divides one white `noise` `[..., H, W]` on the last grid among the stages on `grids`, coarsest first.

    Returns one float32 array `[..., h, w]` for each grid. The first is a field: the noise's lowest
    frequencies, which are the first stage's latents. The others are coefficients, as `expand` reads them.

    White noise stays white, so each stage sees the distribution of fresh noise. But the noise of all stages
    is one field, so a seed means the same picture however the grid grows.
    """
    basis, shared = TRANSFORMS[transform], []
    field = jnp.asarray(noise, jnp.float32)
    for height, width in reversed(grids[:-1]):
        coefficients = basis.analyse(field)
        shared.append(coefficients)
        field = basis.from_corner(coefficients[..., :height, :width])
    return [field, *reversed(shared)]


class Expansion(NamedTuple):
    """How one kind of grid grows: two functions with the signatures of `expand` and `share`."""

    expand: Callable[..., jax.Array] = expand
    share: Callable[..., list[jax.Array]] = share


EXPANSION = Expansion()
