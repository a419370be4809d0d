"""JAX's splash attention, a Pallas kernel for TPUs that keeps no scores."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange

from jaxspd.models.kernels import Unserved

# Queries and keys that are worked on at once. Lengths are padded to a multiple of them.
BLOCK = 512
# Of a TPU's vector registers, the lanes, which a head must fill.
LANES = 128
PLATFORM = "tpu"


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_lengths: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention `[B, N, heads, head_dim]`; `interpret` runs the kernel's steps as XLA's operations, on any
    device. Unserved for heads that do not fill a TPU's lanes.
    """
    if (head_dim := query.shape[-1]) % LANES:
        raise Unserved(f"it takes heads of a multiple of {LANES} channels, not of {head_dim}")
    # Here, since it brings Pallas, which other platforms need not wait for.
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
    # All queries and the keys that are no padding are one segment, which sees nothing of another.
    seen = (jnp.arange(key.shape[1]) < lengths[:, None]).astype(jnp.int32)
    segments = splash.SegmentIds(jnp.ones((len(key), scaled.shape[1]), jnp.int32), seen)
    out = jax.vmap(kernel)(*(rearrange(x, "b n h d -> b h n d") for x in (scaled, key, value)), segments)
    return rearrange(out, "b h n d -> b n h d")[:, :queries]


def _block(length: int) -> int:
    """The block for so many tokens: no larger than they need."""
    return min(BLOCK, -(-length // LANES) * LANES)


def _padded(x: jax.Array, multiple: int) -> jax.Array:
    """`x` `[B, N, …]`, zeros added so that `multiple` divides N."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))
