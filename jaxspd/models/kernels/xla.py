"""Attention in XLA's own operations. They serve every case on every platform, but keep the scores in
memory.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange

from jaxspd.target import platform

# The scores that may be held at once, in bytes: of all heads together, and of one head on a CPU. The second
# is about what fits in a CPU's caches.
SCORES, CPU_SCORES = 2**30, 2**24
# The same for an autoencoder. Its other maps need less memory than the first number.
CODER_SCORES = 2**28
PLATFORM = None


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None = None
) -> jax.Array:
    """Attention over `[B, N, heads, head_dim]`; returns the same shape. Queries are split into blocks where
    the scores are too many.
    """
    batch, queries, heads, _ = query.shape
    scores = queries * key.shape[1]
    if platform() == "cpu":
        return _in_blocks(
            lambda some: attention_by_head(some, key, value, key_lengths), query, 1, scores, SCORES
        )

    def all_heads(some: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            some, key, value, key_value_seq_lengths=key_lengths, implementation="xla"
        )

    return _in_blocks(all_heads, query, 1, scores * batch * heads, SCORES)


def attention_by_head(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None = None
) -> jax.Array:
    """Attention over `[B, N, heads, head_dim]`, one head of one sample at a time; returns the same shape.

    XLA's CPU backend is several times slower on a batch of matrices than on one matrix after another. The
    scores of one head also stay in the CPU's caches.
    """
    batch, _, heads, _ = query.shape
    lengths = jnp.full(batch, key.shape[1]) if key_lengths is None else key_lengths

    def attend(one: tuple[jax.Array, ...]) -> jax.Array:
        query, key, value, length = one
        return _one_head(query, key, value, None if key_lengths is None else length)

    one_by_one = (rearrange(x, "b n h d -> (b h) n d") for x in (query, key, value))
    out = jax.lax.map(attend, (*one_by_one, jnp.repeat(lengths, heads)))
    return rearrange(out, "(b h) n d -> b n h d", h=heads)


def single_head_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention of one head over `[B, N, D]`, one sample at a time; returns the same shape.

    An autoencoder's head is too wide for fused kernels, so the scores are kept in memory, for one block of
    queries at a time.
    """

    def attend(one: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v = one
        return _in_blocks(lambda some: _one_head(some, k, v), q, 0, len(q) * len(k), CODER_SCORES)

    return jax.lax.map(attend, (query, key, value))


def _one_head(
    query: jax.Array, key: jax.Array, value: jax.Array, length: jax.Array | None = None
) -> jax.Array:
    """Attention of one head of one sample, `[N, D]`. Queries see the first `length` keys; None means all."""
    scores = jnp.matmul(query, key.T, preferred_element_type=jnp.float32) / math.sqrt(query.shape[-1])
    if length is not None:
        scores = jnp.where(jnp.arange(len(key)) < length, scores, -jnp.inf)
    return jax.nn.softmax(scores).astype(value.dtype) @ value


def _in_blocks(
    attend: Callable[[jax.Array], jax.Array], query: jax.Array, axis: int, scores: int, most: int
) -> jax.Array:
    """`attend(query)`, computed for one block of queries along `axis` at a time if the scores are too many.

    `scores` is the number of float32 scores that `attend(query)` keeps. On a CPU a block keeps at most
    `CPU_SCORES` bytes of them, elsewhere at most `most` bytes.
    """
    queries = query.shape[axis]
    least = -(-4 * scores // (CPU_SCORES if platform() == "cpu" else most))
    # The blocks must be equal, so the next number that divides the queries is used. The grids of videos have
    # many divisors.
    blocks = next(n for n in range(min(max(1, least), queries), queries + 1) if queries % n == 0)
    if blocks == 1:
        return attend(query)
    split = query.reshape(*query.shape[:axis], blocks, queries // blocks, *query.shape[axis + 1 :])
    out = jnp.moveaxis(jax.lax.map(attend, jnp.moveaxis(split, axis, 0)), 0, axis)
    return out.reshape(query.shape)
