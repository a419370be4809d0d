"""Layers that models share (linear layers, norms, time embedding), and the function that calls a block.

Models are made without weights: `parameter` gives the shape and dtype of each. `nnx.merge` fills them.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspd.target import spread


def sinusoidal_embedding(t: jax.Array, dim: int = 256, max_period: float = 10_000.0) -> jax.Array:
    """Cosines, then sines, of `t` `[B]` at `dim / 2` log-spaced frequencies: `[B, dim]`, float32."""
    half = dim // 2
    frequencies = jnp.exp(-np.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Mlp(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, dim_in, dim_hidden, dim_out, activation, *, dtype, use_bias=True):
        self.linear_1 = Linear(dim_in, dim_hidden, dtype=dtype, use_bias=use_bias)
        self.linear_2 = Linear(dim_hidden, dim_out, dtype=dtype, use_bias=use_bias)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(self.activation(self.linear_1(x)))


def gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def parameter(*shape: int, dtype) -> nnx.Param:
    """A parameter that is not filled yet: it holds a shape and a dtype in place of an array."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype))


class Linear(nnx.Module):
    """A linear layer whose weight and results are in `dtype`.

    It sums over the last axes of its input, whose sizes are `dims_in`. Its weight is `[out, *dims_in]`, as
    checkpoints store it, so loading transposes nothing; the product takes equally long either way. Its bias
    is in float32 and is added before the sum is rounded, as cuBLAS does for PyTorch. XLA would add a
    half-precision bias to an already rounded sum, or in a separate pass.
    """

    def __init__(self, dims_in: int | tuple[int, ...], dim_out: int, *, dtype, use_bias=True):
        dims = dims_in if isinstance(dims_in, tuple) else (dims_in,)
        self.summed = len(dims)
        self.weight = parameter(dim_out, *dims, dtype=dtype)
        self.bias = parameter(dim_out, dtype=jnp.float32) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., *dims_in]` to `[..., out]`."""
        weight = self.weight[...]
        axes = tuple(range(x.ndim - self.summed, x.ndim)), tuple(range(1, weight.ndim))
        sums = jnp.tensordot(x.astype(weight.dtype), weight, axes, preferred_element_type=jnp.float32)
        return spread((sums if self.bias is None else sums + self.bias[...]).astype(weight.dtype))


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis (arXiv 1607.06450), computed in float32; the result is in `dtype`.

    `affine=False` leaves out scale and bias, as adaptive normalisation needs it.
    """

    def __init__(self, dim: int, *, dtype, epsilon=1e-6, affine=False):
        self.dtype, self.epsilon = dtype, epsilon
        self.scale = parameter(dim, dtype=dtype) if affine else None
        self.bias = parameter(dim, dtype=dtype) if affine else None

    def __call__(self, x: jax.Array) -> jax.Array:
        exact = x.astype(jnp.float32)
        centred = exact - exact.mean(-1, keepdims=True)
        factor = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        if self.scale is None or self.bias is None:
            return (centred * factor).astype(self.dtype)
        scale, bias = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
        return (centred * (factor * scale) + bias).astype(self.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm over the last axis (arXiv 1910.07467) with a learned scale, computed in float32; the result is
    in `dtype`.
    """

    def __init__(self, dim: int, *, dtype, epsilon=1e-6):
        self.dtype, self.epsilon = dtype, epsilon
        self.scale = parameter(dim, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        exact = x.astype(jnp.float32)
        factor = jax.lax.rsqrt(jnp.square(exact).mean(-1, keepdims=True) + self.epsilon)
        return (exact * (factor * self.scale[...].astype(jnp.float32))).astype(self.dtype)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """`x` `[B, N, D]` scaled and shifted by vectors `[B, D]` (adaptive LayerNorm, arXiv 2212.09748)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def layer(block: nnx.Module, *arguments):
    """The result of `block(*arguments)`. JAX traces one function for all blocks that are alike, so
    `runtime.layerwise` compiles it only once.

    Arguments are arrays, trees of arrays, or None. Whatever differs between calls must be in them.
    """
    return transformer_layer(*nnx.split(block), *arguments)


# `runtime.layerwise` recognises calls of this function by its name.
@partial(jax.jit, static_argnums=0)
def transformer_layer(graph: nnx.GraphDef, parameters: nnx.State, *arguments):
    return nnx.merge(graph, parameters)(*arguments)
