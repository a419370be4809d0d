"""Rotary embedding: queries and keys are rotated by angles that depend on their positions (RoFormer, arXiv
2104.09864).

Positions are static, so cosines and sines are computed on the host, once for all layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange


class Turns(NamedTuple):
    """Cosines and sines `[B or 1, N, 1, head_dim / 2]`, float32, by which queries and keys are rotated."""

    cos: np.ndarray | jax.Array
    sin: np.ndarray | jax.Array


def grid_turns(positions: np.ndarray, axes_dims: tuple[int, ...], theta: float) -> Turns:
    """Turns over several position axes, for a head of `sum(axes_dims)` channels.

    `positions` is `[N, axes]`. Angles are computed in float64.
    """
    angles = [
        np.outer(positions[:, axis].astype(np.float64), theta ** (-np.arange(0, dim, 2) / dim))
        for axis, dim in enumerate(axes_dims)
    ]
    return _turns_by(np.concatenate(angles, axis=-1))


def text_turns(tokens: int, head_dim: int, theta: float) -> Turns:
    """Turns of a language model at positions 0, 1, 2, …. Every step is rounded to float32 as in PyTorch: far
    into a text, one bit of a frequency changes the angle visibly.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    periods = (theta ** exponents.astype(np.float64)).astype(np.float32)
    return _turns_by(np.outer(np.arange(tokens, dtype=np.float32), 1 / periods))


def cut(turns: Turns, tokens: int) -> tuple[Turns, Turns]:
    """The turns of the first `tokens` positions, and the turns of the other positions."""
    return Turns(*(x[:, :tokens] for x in turns)), Turns(*(x[:, tokens:] for x in turns))


def rotate_pairs(x: jax.Array, turns: Turns) -> jax.Array:
    """Rotates pairs of neighbouring channels of `x` `[B, N, heads, head_dim]`, in float32."""
    even, odd = jnp.moveaxis(rearrange(x, "b n h (d two) -> b n h d two", two=2), -1, 0)
    rotated = jnp.stack(_rotated(even, odd, turns), axis=-1)
    return rearrange(rotated, "b n h d two -> b n h (d two)").astype(x.dtype)


def rotate_halves(x: jax.Array, turns: Turns) -> jax.Array:
    """Rotates pairs of channels of `x` `[B, N, heads, head_dim]` that lie half a head apart, in float32."""
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(_rotated(low, high, turns), axis=-1).astype(x.dtype)


def _turns_by(angles: np.ndarray) -> Turns:
    """Turns by `angles` `[N, head_dim / 2]`, in radians, which are the same for every sample and head."""
    return Turns(*(f(angles).astype(np.float32)[None, :, None] for f in (np.cos, np.sin)))


def _rotated(first: jax.Array, second: jax.Array, turns: Turns) -> tuple[jax.Array, jax.Array]:
    cos, sin = turns
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    return first * cos - second * sin, second * cos + first * sin
