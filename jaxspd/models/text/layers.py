"""Layers that text encoders share: masks, projections, activations by name, gated MLPs, embeddings."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from jaxspd.errors import UsageError
from jaxspd.models.layers import Linear, gelu_tanh, parameter

# The keys are the names that configurations use; two names mean the same function.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def check_activation(name: str, folder: Path) -> None:
    """Raises UsageError if no activation is called `name`. `folder` holds the configuration that asks for
    it.
    """
    if name not in ACTIVATIONS:
        raise UsageError(
            f"{folder}/config.json wants the activation {name!r}; known are {', '.join(ACTIVATIONS)}"
        )


def activate(name: str, x: jax.Array) -> jax.Array:
    """The activation called `name`, applied to `x` in float32; the result has the dtype of `x`."""
    return ACTIVATIONS[name](x.astype(jnp.float32)).astype(x.dtype)


def causal(tokens: int, window: int | None = None) -> np.ndarray:
    """Which of `tokens` keys (columns) each query (row) sees, boolean `[T, T]`: itself and the keys before
    it, at most `window` in all.
    """
    distance = np.subtract.outer(np.arange(tokens), np.arange(tokens))
    return (distance >= 0) & (distance < (window or tokens))


def visible(pattern: np.ndarray | None, mask: jax.Array | None) -> jax.Array | np.ndarray | None:
    """Which keys each query sees, boolean and broadcast to `[B, heads, T, T]`; None means all.

    `pattern` `[T, T]` holds for all texts. `mask` `[B, T]` is zero at padding.
    """
    seen = None if pattern is None else pattern[None, None]
    if mask is None:
        return seen
    keys = jnp.asarray(mask, bool)[:, None, None, :]
    return keys if seen is None else keys & seen


class Attention(nnx.Module):
    """Projections to queries, keys and values, and from the attention's result back to the width `dim`."""

    def __init__(
        self,
        dim: int,
        heads: int,
        groups: int,
        head_dim: int,
        *,
        dtype,
        qkv_bias=False,
        out_bias=False,
    ):
        self.q, self.k, self.v = (
            Linear(dim, count * head_dim, dtype=dtype, use_bias=qkv_bias) for count in (heads, groups, groups)
        )
        self.out = Linear(heads * head_dim, dim, dtype=dtype, use_bias=out_bias)
        self.head_dim = head_dim

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values `[B, T, heads or groups, head_dim]` of `x` `[B, T, D]`."""
        query, key, value = (
            rearrange(linear(x), "b t (h d) -> b t h d", d=self.head_dim)
            for linear in (self.q, self.k, self.v)
        )
        return query, key, value


class GatedMlp(nnx.Module):
    """An MLP whose hidden units are multiplied by an activated gate, without biases (arXiv 2002.05202)."""

    def __init__(self, dim: int, dim_hidden: int, activation: str, *, dtype):
        self.gate, self.up = (Linear(dim, dim_hidden, dtype=dtype, use_bias=False) for _ in range(2))
        self.down = Linear(dim_hidden, dim, dtype=dtype, use_bias=False)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(activate(self.activation, self.gate(x)) * self.up(x))


class Embedding(nnx.Module):
    """A table of `count` vectors."""

    def __init__(self, count: int, dim: int, *, dtype):
        self.embedding = parameter(count, dim, dtype=dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """`ids` `[...]` to `[..., dim]`."""
        return jnp.take(self.embedding[...], ids, axis=0)
