"""Attention of tokens that are spread over devices: during attention the heads are spread instead.

Source: DeepSpeed-Ulysses (arXiv 2309.14509). Each device then sees the whole sequence for some of the heads,
so fused kernels and masks work unchanged.
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
    """`attend(query, key, value, key_lengths)` of arrays `[B, N, heads, head_dim]` that are sharded by
    `spec`.

    If the number of devices does not divide the tokens or the heads, zeros fill them up; the results for the
    zeros are cut off.
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
    # Pallas kernels do not declare how their results vary over devices, so JAX's check of this is turned off.
    spread = jax.shard_map(
        on_device, in_specs=(spec, spec, spec, PartitionSpec(samples)), out_specs=spec, check_vma=False
    )
    return spread(*filled, key_lengths)[:, :queries, :heads]


def _filled(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """`x` with zeros appended along `axis`, up to a multiple of `multiple`."""
    missing = [(0, -size % multiple if number == axis else 0) for number, size in enumerate(x.shape)]
    return jnp.pad(x, missing)
