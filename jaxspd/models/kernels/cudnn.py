"""cuDNN's fused attention for half precision on CUDA. It keeps no scores in memory."""

import jax
import jax.numpy as jnp

from jaxspd.errors import first_line
from jaxspd.models.kernels import Unserved

PLATFORM = "gpu"


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None = None
) -> jax.Array:
    """Attention over `[B, N, heads, head_dim]`; returns the same shape. Raises Unserved for float32, for head
    sizes that cuDNN does not support, and where cuDNN is missing or too old.
    """
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise Unserved(f"it computes in half precision, not in {query.dtype}")
    try:
        return jax.nn.dot_product_attention(
            query, key, value, key_value_seq_lengths=key_lengths, implementation="cudnn"
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise Unserved(first_line(error).rstrip(".")) from error
