"""JAX's splash attention, a Pallas kernel for TPUs. It keeps no scores in memory."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange

from jaxspd.models.kernels import Unserved

# The largest number of queries or keys in one block. Lengths are padded to a multiple of the block's size.
BLOCK = 512
# Lanes of a TPU's vector register. The channels of a head must fill them.
LANES = 128
PLATFORM = "tpu"


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_lengths: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention over `[B, N, heads, head_dim]`; returns the same shape. With `interpret`, the kernel's steps
    run as XLA operations on any device. Raises Unserved if the head size is not a multiple of `LANES`.
    """
    if (head_dim := query.shape[-1]) % LANES:
        raise Unserved(f"it takes heads of a multiple of {LANES} channels, not of {head_dim}")
    # This import loads Pallas, which other platforms do not need.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    queries, keys, heads = query.shape[1], key.shape[1], query.shape[2]
    block_q, block_kv = _block(queries), _block(keys)
    scaled = _padded(query / math.sqrt(head_dim), block_q)
    key, value = _padded(key, block_kv), _padded(value, block_kv)
    mask = splash.MultiHeadMask([splash.FullMask((scaled.shape[1], key.shape[1]))] * heads)
    kernel = splash.make_splash_mha_single_device(
        mask,
        block_sizes=splash.BlockSizes(block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv),
        interpret=interpret,
    )
    lengths = jnp.full(len(key), keys) if key_lengths is None else key_lengths
    # All queries and all keys except padding are in segment 1; tokens of one segment see only each other.
    seen = (jnp.arange(key.shape[1]) < lengths[:, None]).astype(jnp.int32)
    segments = splash.SegmentIds(jnp.ones((len(key), scaled.shape[1]), jnp.int32), seen)
    out = jax.vmap(kernel)(*(rearrange(x, "b n h d -> b h n d") for x in (scaled, key, value)), segments)
    return rearrange(out, "b h n d -> b n h d")[:, :queries]


def _block(length: int) -> int:
    """The block size for `length` tokens: at most `BLOCK`, and no larger than needed."""
    return min(BLOCK, -(-length // LANES) * LANES)


def _padded(x: jax.Array, multiple: int) -> jax.Array:
    """`x` `[B, N, …]` with zeros appended, so that N is a multiple of `multiple`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))
