"""Attention of tokens that are spread over devices: during attention the heads are spread instead.

Source: DeepSpeed-Ulysses (arXiv 2309.14509). Each device then sees the whole sequence for some of the heads,
so fused kernels and masks work unchanged.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import PartitionSpec

from jaxspd.target import ways

Sequences = Sequence[jax.Array]


def by_heads(
    attend: Callable[..., list[jax.Array]],
    queries: Sequences,
    keys: Sequences,
    values: Sequences,
    key_lengths: jax.Array | None,
    spec: PartitionSpec,
) -> list[jax.Array]:
    """`attend(queries, keys, values, key_lengths)` of sequences `[B, N, heads, head_dim]`, each sharded by
    `spec`; returns one array for each of `queries`.

    One exchange takes all sequences to their heads' devices and another takes the results back, since a small
    exchange takes as long as its start. If the number of devices does not divide the tokens or the heads,
    zeros fill them up; the results for the zeros are cut off.
    """
    samples, tokens = spec
    devices, heads = ways(tokens), queries[0].shape[2]
    given = [*queries, *keys, *values]

    def exchanged(parts: Sequences) -> Sequences:
        """Sends `parts` `[devices, B, n, h, head_dim]` along their first axis, which counts the devices that
        they go to, and then those that they come from.
        """
        together = jax.lax.all_to_all(jnp.concatenate(parts, axis=2), tokens, 0, 0, tiled=True)
        return jnp.split(together, np.cumsum([part.shape[2] for part in parts])[:-1], axis=2)

    def on_device(parts, key_lengths):
        sent = exchanged([rearrange(x, "b n (d h) c -> d b n h c", d=devices) for x in parts])
        whole = [
            rearrange(x, "d b n h c -> b (d n) h c")[:, : of.shape[1]]
            for x, of in zip(sent, given, strict=True)
        ]
        q, k = len(queries), len(queries) + len(keys)
        results = attend(whole[:q], whole[q:k], whole[k:], key_lengths)
        filled = (_filled(x, 1, devices) for x in results)
        back = exchanged([rearrange(x, "b (d n) h c -> d b n h c", d=devices) for x in filled])
        return [rearrange(x, "d b n h c -> b n (d h) c") for x in back]

    # Pallas kernels do not declare how their results vary over devices, so JAX's check of this is turned off.
    spread = jax.shard_map(
        on_device, in_specs=(spec, PartitionSpec(samples)), out_specs=spec, check_vma=False
    )
    results = spread([_filled(_filled(x, 1, devices), 2, devices) for x in given], key_lengths)
    return [x[:, : query.shape[1], :heads] for x, query in zip(results, queries, strict=True)]


def _filled(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """`x` with zeros appended along `axis`, up to a multiple of `multiple`."""
    missing = [(0, -size % multiple if number == axis else 0) for number, size in enumerate(x.shape)]
    return jnp.pad(x, missing)
