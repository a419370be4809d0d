"""Scaled dot-product attention, softmax in float32: of transformers, of text encoders under masks, and of
autoencoders with one head.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

# Scores of queries against keys that may be held at once, in bytes: of all heads, and of one head on a CPU,
# about what stays in its caches.
SCORES, CPU_SCORES = 2**30, 2**24


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None = None
) -> jax.Array:
    """Attention over `[B, N, heads, head_dim]`: `[B, N, heads * head_dim]`.

    `key_lengths` `[B]` counts the keys that are no padding; padding comes last. cuDNN's fused kernel runs
    half precision on CUDA. Elsewhere every score is kept in memory, so long sequences go through in blocks of
    queries.
    """
    batch, queries, heads, head_dim = query.shape
    # cuDNN takes half precision only, and head sizes that are multiples of 8.
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    fused = jax.default_backend() == "gpu" and half and head_dim % 8 == 0
    scores = queries * key.shape[1]

    def attend(some: jax.Array) -> jax.Array:
        if _on_cpu():
            return attention_by_head(some, key, value, key_lengths)
        return jax.nn.dot_product_attention(
            some,
            key,
            value,
            key_value_seq_lengths=key_lengths,
            implementation="cudnn" if fused else "xla",
        )

    if fused:
        out = attend(query)
    else:
        out = _in_blocks(attend, query, 1, scores * (1 if _on_cpu() else batch * heads))
    return rearrange(out, "b n h d -> b n (h d)")


def attention_by_head(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None = None
) -> jax.Array:
    """Attention `[B, N, heads, head_dim]`, one head of one sample after the other.

    XLA's CPU backend multiplies a batch of matrices several times slower than one matrix after another,
    whose scores moreover stay in the caches.
    """
    batch, _, heads, _ = query.shape
    lengths = jnp.full(batch, key.shape[1]) if key_lengths is None else key_lengths

    def attend(one: tuple[jax.Array, ...]) -> jax.Array:
        *maps, length = one
        return _one_head(*maps, None if key_lengths is None else length)

    one_by_one = (rearrange(x, "b n h d -> (b h) n d") for x in (query, key, value))
    out = jax.lax.map(attend, (*one_by_one, jnp.repeat(lengths, heads)))
    return rearrange(out, "(b h) n d -> b n h d", h=heads)


def single_head_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention of one head over `[B, N, D]`, of one sample after the other; returns the same shape.

    An autoencoder's head is too wide for fused kernels, so that every score is kept in memory: of a block of
    queries at a time.
    """

    def attend(one: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v = one
        return _in_blocks(lambda some: _one_head(some, k, v), q, 0, len(q) * len(k))

    return jax.lax.map(attend, (query, key, value))


def masked_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: jax.Array | np.ndarray | None,
    bias: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Attention of queries `[B, T, heads, head_dim]` to keys and values `[B, T, groups, head_dim]`:
    `[B, T, heads * head_dim]`.

    Neighbouring heads share the keys of a group. `seen`, boolean and broadcast to `[B, heads, T, T]`, says
    which keys each query sees, None all; a query that sees no key gets zeros, as in PyTorch. `bias`
    `[1, heads, T, T]` is added to the scores, which are products times `scale` (1/√head_dim). Texts are
    short, so all scores are held at once.
    """
    seen = None if seen is None else jnp.asarray(seen)
    out = jax.nn.dot_product_attention(
        query, key, value, bias=bias, mask=seen, scale=scale, implementation="xla"
    )
    if seen is not None:
        out = jnp.where(seen.any(-1)[:, 0, :, None, None], out, 0)
    return rearrange(out, "b t h d -> b t (h d)")


def _one_head(
    query: jax.Array, key: jax.Array, value: jax.Array, length: jax.Array | None = None
) -> jax.Array:
    """Attention of one head of one sample, `[N, D]`; beyond the first `length` keys none is seen."""
    scores = jnp.matmul(query, key.T, preferred_element_type=jnp.float32) / math.sqrt(query.shape[-1])
    if length is not None:
        scores = jnp.where(jnp.arange(len(key)) < length, scores, -jnp.inf)
    return jax.nn.softmax(scores).astype(value.dtype) @ value


def _in_blocks(
    attend: Callable[[jax.Array], jax.Array], query: jax.Array, axis: int, scores: int
) -> jax.Array:
    """`attend(query)`, which keeps that many `scores`; of a block of queries, along `axis`, at a time where
    they are too many.
    """
    queries = query.shape[axis]
    least = -(-4 * scores // (CPU_SCORES if _on_cpu() else SCORES))
    # The nearest number of equal blocks; the grids that videos are made of have many divisors.
    blocks = next(n for n in range(min(max(1, least), queries), queries + 1) if queries % n == 0)
    if blocks == 1:
        return attend(query)
    split = query.reshape(*query.shape[:axis], blocks, queries // blocks, *query.shape[axis + 1 :])
    out = jnp.moveaxis(jax.lax.map(attend, jnp.moveaxis(split, axis, 0)), 0, axis)
    return out.reshape(query.shape)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"
