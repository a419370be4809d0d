"""Attention of tokens that are spread over devices: for as long as it takes, heads are spread instead.

Source: DeepSpeed-Ulysses (arXiv 2309.14509). Each device then sees the whole sequence of some heads, so that
fused kernels and masks serve as they are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxspd.target import ways


def by_heads(
    attend: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_lengths: jax.Array | None,
    spec: PartitionSpec,
) -> jax.Array:
    """`attend(query, key, value, key_lengths)`, `[B, N, heads, head_dim]`, of arrays that lie as `spec` says.

    Tokens and heads that the devices do not divide are filled up with zeros, and what comes of these is cut.
    """
    samples, tokens = spec
    devices, (_, queries, heads, _) = ways(tokens), query.shape

    def exchanged(x: jax.Array, away: int, here: int) -> jax.Array:
        return jax.lax.all_to_all(x, tokens, away, here, tiled=True)

    def on_device(query, key, value, key_lengths):
        query, key, value = (
            exchanged(x, 2, 1)[:, :count] for x, count in ((query, queries), (key, keys), (value, keys))
        )
        return exchanged(_filled(attend(query, key, value, key_lengths), 1, devices), 1, 2)

    keys = key.shape[1]
    filled = (_filled(_filled(x, 1, devices), 2, devices) for x in (query, key, value))
    # Kernels written in Pallas do not say how their results vary over devices, which would be checked.
    spread = jax.shard_map(
        on_device, in_specs=(spec, spec, spec, PartitionSpec(samples)), out_specs=spec, check_vma=False
    )
    return spread(*filled, key_lengths)[:, :queries, :heads]


def _filled(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """`x` with zeros behind, to a multiple along `axis`."""
    missing = [(0, -size % multiple if number == axis else 0) for number, size in enumerate(x.shape)]
    return jnp.pad(x, missing)
