"""Layers that diffusion transformers share: attention, rotary positions, time embedding, rows of blocks."""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

# Scores of queries against keys that XLA's attention may hold at once, in bytes: of all heads, and of
# one head on a CPU, about what stays in its caches.
SCORES, CPU_SCORES = 2**30, 2**24
# What `run` calls the function that a layer is, by which `runtime.layerwise` knows it.
LAYER = "transformer_layer"


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


def rope_table(positions: np.ndarray, axes_dims: tuple[int, ...], theta: float) -> np.ndarray:
    """Angles of a rotary embedding over several position axes (RoFormer, arXiv 2104.09864).

    `positions` is `[N, axes]`; the result is `[N, sum(axes_dims) / 2]`, in radians. Positions are
    static, so the table is made on the host in float64 and becomes a constant of the program.
    """
    angles = [
        np.outer(positions[:, axis].astype(np.float64), theta ** (-np.arange(0, dim, 2) / dim))
        for axis, dim in enumerate(axes_dims)
    ]
    return np.concatenate(angles, axis=-1)


def apply_rope(x: jax.Array, angles: np.ndarray) -> jax.Array:
    """Rotates `x` `[B, N, heads, head_dim]` by `angles` `[N, head_dim / 2]`."""
    cos, sin = (jnp.asarray(f(angles), jnp.float32)[None, :, None, :] for f in (np.cos, np.sin))
    return rotate(x, cos, sin)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates neighbouring channel pairs of `x` `[B, N, heads, head_dim]` in float32, by angles whose
    cosines and sines broadcast to `[B, N, heads, head_dim / 2]`.
    """
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


def stack(make, length: int, rngs: nnx.Rngs):
    """`length` equal modules as one, each parameter a tuple of `length` arrays; None for zero."""
    if length == 0:
        return None
    blocks = nnx.vmap(make)(rngs.split(length))
    for _, parameter in nnx.to_flat_state(nnx.state(blocks)):
        parameter.set_value(tuple(jnp.unstack(parameter.get_value())))
    return blocks


def run(blocks, carry, *shared):
    """What the last of stacked `blocks` gives, run one after another as by `each`; None runs nothing."""
    if blocks is None:
        return carry
    *_, last = each(blocks, carry, *shared)
    return last


def each(blocks, carry, *shared) -> Iterator:
    """Runs stacked `blocks` one after another: gives each `carry = block(carry, *shared)`.

    NumPy arrays among `shared` become constants. All blocks are calls of one function, which JAX traces once
    and `runtime.layerwise` compiles once, however many there are.
    """
    graph, state = nnx.split(blocks)
    parameters = nnx.to_flat_state(state)
    leaves, tree = jax.tree.flatten(shared)
    traced = {n: leaf for n, leaf in enumerate(leaves) if not isinstance(leaf, np.ndarray)}

    def layer(own, carry, traced):
        shared = tree.unflatten(traced.get(n, leaf) for n, leaf in enumerate(leaves))
        block = nnx.from_flat_state(
            [(path, p.replace(value)) for (path, p), value in zip(parameters, own, strict=True)]
        )
        return nnx.merge(graph, block)(carry, *shared)

    layer.__name__ = LAYER
    call = jax.jit(layer)
    for own in zip(*(parameter.get_value() for _, parameter in parameters), strict=True):
        carry = call(own, carry, traced)
        yield carry
