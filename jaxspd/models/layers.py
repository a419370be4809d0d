"""Layers that diffusion transformers share: attention, rotary positions, time embedding, rows of blocks."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

# Scores of queries against keys that XLA's attention may hold at once, in bytes: of all heads, and of
# one head on a CPU, about what stays in its caches.
SCORES, CPU_SCORES = 2**30, 2**24


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None = None
) -> jax.Array:
    """Scaled dot-product attention over `[B, N, heads, head_dim]`, softmax in float32.

    `key_lengths` `[B]` counts the keys that are no padding; padding comes last. Returns
    `[B, N, heads * head_dim]`. cuDNN's fused kernel runs half precision on CUDA. Elsewhere every score is
    kept in memory, so long sequences go through in blocks of queries.
    """
    batch, queries, heads, head_dim = query.shape
    cpu = jax.default_backend() == "cpu"
    # cuDNN takes half precision only, and head sizes that are multiples of 8.
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    fused = jax.default_backend() == "gpu" and half and head_dim % 8 == 0

    def attend(block: jax.Array) -> jax.Array:
        if cpu:
            return attention_by_head(block, key, value, key_lengths)
        return jax.nn.dot_product_attention(
            block,
            key,
            value,
            key_value_seq_lengths=key_lengths,
            implementation="cudnn" if fused else "xla",
        )

    scores = 4 * queries * key.shape[1] * (1 if cpu else batch * heads)
    blocks = 1 if fused else -(-scores // (CPU_SCORES if cpu else SCORES))
    # The nearest number of equal blocks; the grids that videos are made of have many divisors.
    blocks = next(n for n in range(blocks, queries + 1) if queries % n == 0)
    if blocks == 1:
        out = attend(query)
    else:
        out = jax.lax.map(attend, rearrange(query, "b (m n) h d -> m b n h d", m=blocks))
        out = rearrange(out, "m b n h d -> b (m n) h d")
    return rearrange(out, "b n h d -> b n (h d)")


def attention_by_head(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None = None
) -> jax.Array:
    """Attention `[B, N, heads, head_dim]`, one head of one sample after the other.

    XLA's CPU backend multiplies a batch of matrices several times slower than one matrix after another,
    whose scores moreover stay in the caches.
    """
    batch, _, heads, head_dim = query.shape
    lengths = jnp.full(batch, key.shape[1]) if key_lengths is None else key_lengths

    def attend(one: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v, length = one
        scores = jnp.matmul(q, k.T, preferred_element_type=jnp.float32) / math.sqrt(head_dim)
        if key_lengths is not None:
            scores = jnp.where(jnp.arange(k.shape[0]) < length, scores, -jnp.inf)
        return jax.nn.softmax(scores).astype(v.dtype) @ v

    one_by_one = (rearrange(x, "b n h d -> (b h) n d") for x in (query, key, value))
    out = jax.lax.map(attend, (*one_by_one, jnp.repeat(lengths, heads)))
    return rearrange(out, "(b h) n d -> b n h d", h=heads)


class Turns(NamedTuple):
    """Cosines and sines `[B or 1, N, 1, head_dim / 2]` by which queries and keys turn, float32."""

    cos: np.ndarray | jax.Array
    sin: np.ndarray | jax.Array


def rope_turns(positions: np.ndarray, axes_dims: tuple[int, ...], theta: float) -> Turns:
    """A rotary embedding over several position axes (RoFormer, arXiv 2104.09864), for a head of
    `sum(axes_dims)` channels.

    `positions` is `[N, axes]`. They are static, so angles are made on the host in float64, once for all
    layers.
    """
    angles = [
        np.outer(positions[:, axis].astype(np.float64), theta ** (-np.arange(0, dim, 2) / dim))
        for axis, dim in enumerate(axes_dims)
    ]
    return turns_by(np.concatenate(angles, axis=-1))


def turns_by(angles: np.ndarray) -> Turns:
    """Turns of every sample and head alike by `angles` `[N, head_dim / 2]`, in radians."""
    return Turns(*(f(angles).astype(np.float32)[None, :, None] for f in (np.cos, np.sin)))


def rotate(x: jax.Array, turns: Turns) -> jax.Array:
    """Rotates neighbouring channel pairs of `x` `[B, N, heads, head_dim]` in float32."""
    cos, sin = turns
    even, odd = jnp.moveaxis(rearrange(x, "b n h (d two) -> b n h d two", two=2), -1, 0)
    even, odd = even.astype(jnp.float32), odd.astype(jnp.float32)
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rearrange(rotated, "b n h d two -> b n h (d two)").astype(x.dtype)


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
