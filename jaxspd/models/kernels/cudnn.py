"""cuDNN's fused attention, which keeps no scores: half precision on CUDA."""

import jax
import jax.numpy as jnp

from jaxspd.errors import first_line
from jaxspd.models.kernels import Unserved

PLATFORM = "gpu"


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None = None
) -> jax.Array:
    """Attention `[B, N, heads, head_dim]`. Unserved in float32, for sizes of heads that it has not, and
    where cuDNN is missing or too old.
    """
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unserved(f"it computes in half precision, not in {query.dtype}")
    try:
        return jax.nn.dot_product_attention(
            query, key, value, key_value_seq_lengths=key_lengths, implementation="cudnn"
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise Unserved(first_line(error).rstrip(".")) from error
