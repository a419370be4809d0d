"""Linear layers with 8-bit weights and 8-bit products.

A weight has one scale per output. An input has one scale per token, computed in every call. This is
vector-wise quantisation (LLM.int8(), arXiv 2208.07339), in int8 or in FP8's E4M3 (arXiv 2209.05433). Products
run on the device's 8-bit units where it has them, and are summed in int32 or float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspd.convert.rounding import LARGEST
from jaxspd.errors import UsageError
from jaxspd.models.layers import Linear, parameter
from jaxspd.target import spread

# The keys are the names that users give.
DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}


class QuantizedLinear(nnx.Module):
    """A linear layer over the last axis. Its weight `[out, in]` is in 8 bits, with one scale per output.

    `dtype` is the dtype of the results. The bias is in float32 and is added before they are rounded to
    `dtype`.
    """

    def __init__(self, dim_in: int, dim_out: int, *, dtype, weight_dtype, use_bias=True):
        self.dtype = dtype
        self.weight = parameter(dim_out, dim_in, dtype=weight_dtype)
        self.weight_scale = parameter(dim_out, dtype=jnp.float32)
        self.bias = parameter(dim_out, dtype=jnp.float32) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in]` to `[..., out]`."""
        weight = self.weight[...]
        values, scale = rounded(x, weight.dtype)
        exact = jnp.int32 if weight.dtype == jnp.int8 else jnp.float32
        axes = ((x.ndim - 1,), (1,)), ((), ())
        sums = jax.lax.dot_general(values, weight, axes, preferred_element_type=exact)
        result = sums.astype(jnp.float32) * scale * self.weight_scale[...]
        return spread((result if self.bias is None else result + self.bias[...]).astype(self.dtype))


def rounded(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """`x` `[..., D]` rounded to `dtype`, and the unit `[..., 1]` of each row: `x` is about their product.

    The unit makes the largest magnitude of a row the largest number of `dtype`. A row with a number that is
    not finite has a unit that is not finite.
    """
    x = x.astype(jnp.float32)
    unit = jnp.abs(x).max(-1, keepdims=True) / LARGEST[jnp.dtype(dtype)]
    unit = jnp.where(unit == 0, 1, unit)
    values = x / unit
    return (jnp.rint(values) if dtype == jnp.int8 else values).astype(dtype), unit


def quantize(model: nnx.Module, kind: str) -> None:
    """Replaces the linear layers in the blocks of `model`, which has no weights yet, by layers quantised to
    `kind`.

    Two sorts of layers stay. Layers outside the blocks read pictures, texts and time, or give velocities.
    Layers that compute modulation have few vectors, which reach every token. Raises UsageError if `kind` is
    not in `DTYPES`.
    """
    if kind not in DTYPES:
        raise UsageError(f"unknown quantize {kind!r}; use {' or '.join(DTYPES)}")
    for path, module in [*nnx.iter_graph(model)]:
        if not isinstance(module, nnx.Module) or not any(isinstance(part, int) for part in path):
            continue
        for name, layer in [*vars(module).items()]:
            if type(layer) is Linear and not any("modulation" in f"{part}" for part in (*path, name)):
                setattr(module, name, like(layer, DTYPES[kind]))


def like(layer: Linear, weight_dtype) -> QuantizedLinear:
    """The quantised layer that replaces `layer`."""
    weight = layer.weight.get_value()
    dim_out, dim_in = weight.shape
    return QuantizedLinear(
        dim_in, dim_out, dtype=weight.dtype, weight_dtype=weight_dtype, use_bias=layer.bias is not None
    )
