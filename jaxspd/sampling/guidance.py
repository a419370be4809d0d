"""Classifier-free guidance (arXiv 2207.12598): away from the negative prompt, towards the prompt."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

Velocity = Callable[..., jax.Array]


class Guided(NamedTuple):
    """A guided denoiser's conditioning: the prompt's, the negative prompt's, and the guidance scale `[B]`."""

    positive: Any
    negative: Any
    scale: Any


def extrapolate(positive: jax.Array, negative: jax.Array, scale: jax.Array) -> jax.Array:
    """The rule as published: `negative + scale·(positive - negative)`."""
    return negative + scale * (positive - negative)


def guide(velocity: Velocity, combine=extrapolate, *, batched: bool) -> Velocity:
    """`velocity(parameters, latents, sigma, conditioning)`, made to take `Guided` conditioning too.

    `combine(positive, negative, scale)` makes one velocity of two, in float32. If `batched`, both come from
    one forward of twice the batch. Otherwise they come from two forwards in a row, in half the memory.
    """

    def guided(parameters, latents, sigma, conditioning):
        if not isinstance(conditioning, Guided):
            return velocity(parameters, latents, sigma, conditioning)
        pair = conditioning.positive, conditioning.negative
        if batched:
            both = velocity(
                parameters,
                jnp.concatenate([latents, latents]),
                sigma,
                jax.tree.map(lambda *two: jnp.concatenate(two), *pair),
            )
            positive, negative = jnp.split(both.astype(jnp.float32), 2)
        else:
            # The velocity is traced once, so that both forwards share their layers' programs.
            once = jaxpr_as_fun(jax.make_jaxpr(velocity)(parameters, latents, sigma, pair[0]))
            positive, negative = (
                once(*jax.tree.leaves((parameters, latents, sigma, one)))[0].astype(jnp.float32)
                for one in pair
            )
        scale = jnp.expand_dims(conditioning.scale, range(1, latents.ndim))
        return combine(positive, negative, scale)

    return guided
