"""Layers that models share: linear ones, norms, time embedding, rows of blocks."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def sinusoidal_embedding(t: jax.Array, dim: int = 256, max_period: float = 10_000.0) -> jax.Array:
    """Cosines, then sines, of `t` `[B]` at `dim / 2` log-spaced frequencies: `[B, dim]`, float32."""
    half = dim // 2
    frequencies = jnp.exp(-np.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Mlp(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, dim_in, dim_hidden, dim_out, activation, *, dtype, rngs, use_bias=True):
        self.linear_1 = Linear(dim_in, dim_hidden, dtype=dtype, rngs=rngs, use_bias=use_bias)
        self.linear_2 = Linear(dim_hidden, dim_out, dtype=dtype, rngs=rngs, use_bias=use_bias)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(self.activation(self.linear_1(x)))


def gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


class Linear(nnx.Module):
    """A linear layer whose parameters and products are in `dtype`.

    `dims_in` are the axes of its input that it sums over, the last ones. Its weight is `[out, *dims_in]`, as
    checkpoints store it: loading then need not turn matrices, and a product takes as long either way.
    """

    def __init__(self, dims_in: int | tuple[int, ...], dim_out: int, *, dtype, rngs: nnx.Rngs, use_bias=True):
        shape = (dim_out, *dims_in) if isinstance(dims_in, tuple) else (dim_out, dims_in)
        self.summed = len(shape) - 1
        init = nnx.initializers.lecun_normal(in_axis=range(1, len(shape)), out_axis=0)
        self.weight = nnx.Param(init(rngs.params(), shape, dtype))
        self.bias = nnx.Param(jnp.zeros(dim_out, dtype)) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., *dims_in]` to `[..., out]`."""
        weight = self.weight[...]
        axes = tuple(range(x.ndim - self.summed, x.ndim)), tuple(range(1, weight.ndim))
        out = jnp.tensordot(x.astype(weight.dtype), weight, axes)
        return out if self.bias is None else out + self.bias[...]


def layer_norm(dim: int, *, dtype, rngs: nnx.Rngs, epsilon=1e-6) -> nnx.LayerNorm:
    """LayerNorm without scale and bias, as adaptive normalisation wants it; statistics in float32."""
    return nnx.LayerNorm(dim, epsilon=epsilon, use_bias=False, use_scale=False, dtype=dtype, rngs=rngs)


def rms_norm(dim: int, *, dtype, rngs: nnx.Rngs, epsilon=1e-6) -> nnx.RMSNorm:
    """RMSNorm over the last axis with a learned scale; statistics in float32."""
    return nnx.RMSNorm(dim, epsilon=epsilon, dtype=dtype, param_dtype=dtype, rngs=rngs)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """`x` `[B, N, D]` scaled and shifted by vectors `[B, D]` (adaptive LayerNorm, arXiv 2212.09748)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def stack(make: Callable[[nnx.Rngs], nnx.Module], length: int, rngs: nnx.Rngs) -> nnx.List:
    """`length` modules as `make(rngs)` gives them, equal but for their parameters."""
    if length == 0:
        return nnx.List()
    # All at once, and then told apart: tracing one after the other takes seconds with deep models.
    graph, state = nnx.split(nnx.vmap(make)(rngs.split(length)))
    parameters = [(path, p, jnp.unstack(p.get_value())) for path, p in nnx.to_flat_state(state)]
    return nnx.List(
        nnx.merge(graph, nnx.from_flat_state([(path, p.replace(own[n])) for path, p, own in parameters]))
        for n in range(length)
    )


def abstract(make: Callable[[], nnx.Module]) -> nnx.Module:
    """What `make()` gives, with shapes and dtypes in place of arrays: as `nnx.eval_shape`, which takes three
    times as long with deep models.
    """
    kept = []

    def arrays() -> list[jax.Array]:
        graph, state = nnx.split(make())
        kept.append((graph, nnx.to_flat_state(state)))
        return [parameter.get_value() for _, parameter in kept[0][1]]

    shapes = jax.eval_shape(arrays)
    [(graph, parameters)] = kept
    filled = [(path, p.replace(shape)) for (path, p), shape in zip(parameters, shapes, strict=True)]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def layer(block: nnx.Module, *arguments):
    """What `block(*arguments)` gives, computed by a function that JAX traces once for all blocks alike, so
    that `runtime.layerwise` compiles it once, however many there are.

    Arguments are arrays, trees of them, or None. They must say all that differs from call to call.
    """
    return transformer_layer(*nnx.split(block), *arguments)


# `runtime.layerwise` knows the calls of this function by its name.
@partial(jax.jit, static_argnums=0)
def transformer_layer(graph: nnx.GraphDef, parameters: nnx.State, *arguments):
    return nnx.merge(graph, parameters)(*arguments)
