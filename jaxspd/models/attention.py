"""Scaled dot-product attention with softmax in float32. Transformers use the best kernel for the target; text
encoders use masks.
"""

import logging
from collections.abc import Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jaxspd.errors import UsageError
from jaxspd.models.kernels import Unserved, cudnn, splash, xla
from jaxspd.models.ulysses import by_heads
from jaxspd.target import forced_attention, layout, platform

log = logging.getLogger("jaxspd")

# The names are those that users give; the best backend comes first.
BACKENDS = {"cudnn": cudnn, "splash": splash, "xla": xla}


def check_backend(name: str | None, platform: str) -> None:
    """Raises UsageError unless `name` is None or an attention backend that runs on `platform`."""
    if name is None:
        return
    if name not in BACKENDS:
        raise UsageError(f"unknown attention_backend {name!r}; use one of {', '.join(BACKENDS)}")
    needed = BACKENDS[name].PLATFORM
    if needed not in (None, platform):
        raise UsageError(f"attention_backend {name} needs a {needed.upper()}; leave it out")


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None = None
) -> jax.Array:
    """Attention over `[B, N, heads, head_dim]`; returns `[B, N, heads * head_dim]`.

    `key_lengths` `[B]` counts each sample's keys without padding; padding comes last. The first of `BACKENDS`
    that can serve on the target's platform is used. A backend that cannot serve is skipped with a warning,
    given once; if the user forced it, UsageError is raised. On several devices each device computes some of
    the heads.
    """
    [out] = joint_attention([query], [key], [value], key_lengths)
    return out


def joint_attention(
    queries: Sequence[jax.Array],
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    key_lengths: jax.Array | None = None,
) -> list[jax.Array]:
    """`attention` over one sequence that is given in parts `[B, N, heads, head_dim]`, in their order; returns
    `[B, N, heads * head_dim]` for each part of the queries.

    Several devices share each part. A sequence that the caller concatenates has to be shared out again.
    """
    spec = layout(len(queries[0]))
    if spec is None:
        outs = _joined(queries, keys, values, key_lengths)
    else:
        outs = by_heads(_joined, queries, keys, values, key_lengths, spec)
    return [rearrange(out, "b n h d -> b n (h d)") for out in outs]


def _joined(queries, keys, values, key_lengths: jax.Array | None) -> list[jax.Array]:
    """`joint_attention` on one device; returns `[B, N, heads, head_dim]` for each part."""
    query, key, value = (jnp.concatenate(parts, axis=1) for parts in (queries, keys, values))
    ends = np.cumsum([part.shape[1] for part in queries])
    return jnp.split(_attention(query, key, value, key_lengths), ends[:-1], axis=1)


def _attention(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None
) -> jax.Array:
    """`attention` on one device; returns `[B, N, heads, head_dim]`."""
    forced = forced_attention()
    for name in [forced] if forced else BACKENDS:
        backend = BACKENDS[name]
        if not forced and backend.PLATFORM not in (None, platform()):
            continue
        try:
            return backend.attend(query, key, value, key_lengths)
        except Unserved as reason:
            if forced:
                raise UsageError(
                    f"attention_backend {name} cannot serve here: {reason}; leave it out"
                ) from reason
            _warn(name, str(reason))
    raise AssertionError("XLA serves everything")


@cache
def _warn(name: str, reason: str) -> None:
    log.warning("attention backend %s cannot serve here: %s; another does", name, reason)


def masked_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: jax.Array | np.ndarray | None,
    bias: jax.Array | np.ndarray | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Attention of queries `[B, T, heads, head_dim]` to keys and values `[B, T, groups, head_dim]`; returns
    `[B, T, heads * head_dim]`.

    Neighbouring heads share the keys of a group. `seen` is boolean, broadcasts to `[B, heads, T, T]` and says
    which keys each query sees; None means all. A query that sees no key gets zeros, as in PyTorch. `scale`
    (by default 1/√head_dim) multiplies the scores; then `bias` `[1, heads, T, T]` is added to them. Texts are
    short, so all scores are held in memory at once.
    """
    seen = None if seen is None else jnp.asarray(seen)
    out = jax.nn.dot_product_attention(
        query, key, value, bias=bias, mask=seen, scale=scale, implementation="xla"
    )
    if seen is not None:
        out = jnp.where(seen.any(-1)[:, 0, :, None, None], out, 0)
    return rearrange(out, "b t h d -> b t (h d)")
