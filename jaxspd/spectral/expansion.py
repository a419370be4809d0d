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
    """`latents` `[..., h, w]` at noise level σ on the grid of `noise` `[..., H, W]`.

    Their coefficients in the basis `transform` become the corner of the finer grid's, whose other
    entries are σ·N(0, 1): `noise` is read as coefficients, its own corner unused. The result is scaled
    by κ (1 for plain `dct`). Float32 throughout; any H ≥ h and W ≥ w that the transform can reach.
    """
    height, width = latents.shape[-2:]
    basis = TRANSFORMS[transform]
    coefficients = sigma * jnp.asarray(noise, jnp.float32)
    known = basis.corner(jnp.asarray(latents, jnp.float32))
    return kappa * basis.synthesise(coefficients.at[..., :height, :width].set(known))


def share(noise: jax.Array, grids: Sequence[tuple[int, int]], transform: str = "dct") -> list[jax.Array]:
    """What the stages on `grids`, coarsest first, see of one white `noise` `[..., H, W]` on the last.

    The first is a field, the first stage's latents: the noise's lowest frequencies. The others are
    coefficients, as `expand` reads them, each the noise's own. White noise stays white, so every stage's law
    is that of fresh noise; but the noise of all stages is one field, so that a seed means the same picture
    however the grid grows.
    """
    basis, shared = TRANSFORMS[transform], []
    field = jnp.asarray(noise, jnp.float32)
    for height, width in reversed(grids[:-1]):
        coefficients = basis.analyse(field)
        shared.append(coefficients)
        field = basis.from_corner(coefficients[..., :height, :width])
    return [field, *reversed(shared)]


class Expansion(NamedTuple):
    """How one kind of grid grows: functions like `expand` and `share`."""

    expand: Callable[..., jax.Array] = expand
    share: Callable[..., list[jax.Array]] = share


EXPANSION = Expansion()
