"""Scaled dot-product attention, softmax in float32: of transformers by the best kernel for the target, and of
text encoders under masks.
"""

import logging
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

# Names, as users give them; the best first.
BACKENDS = {"cudnn": cudnn, "splash": splash, "xla": xla}


def check_backend(name: str | None, platform: str) -> None:
    """UsageError unless the attention backend of that `name`, if any, runs on `platform`."""
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
    """Attention over `[B, N, heads, head_dim]`: `[B, N, heads * head_dim]`.

    `key_lengths` `[B]` counts the keys that are no padding; padding comes last. The first of `BACKENDS` that
    can serve on the target's platform does; a warning tells, once, of one that cannot. UsageError where it is
    forced. On several devices each computes some of the heads.
    """
    spec = layout(len(query))
    if spec is None:
        out = _attention(query, key, value, key_lengths)
    else:
        out = by_heads(_attention, query, key, value, key_lengths, spec)
    return rearrange(out, "b n h d -> b n (h d)")


def _attention(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None
) -> jax.Array:
    """The same on one device: `[B, N, heads, head_dim]`."""
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
