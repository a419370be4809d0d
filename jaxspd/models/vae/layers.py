"""Layers that the autoencoders share. Feature maps are `[N, H, W, C]`. Convolutions' weights are
`[out, in, kh, kw]` as checkpoints store them, so loading transposes nothing.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxspd.models.layers import parameter

EPSILON = 1e-6
# Rows or columns of zeros before and after a map.
Padding = tuple[int, int]


def convolve(x: jax.Array, weight: jax.Array, stride: int = 1, padding: Padding | None = None) -> jax.Array:
    """`x` `[N, H, W, in]` convolved with `weight` `[out, in, k, k]`. The default padding keeps the size if
    `stride` is 1.
    """
    around = padding or ((weight.shape[-1] - 1) // 2,) * 2
    # XLA transposes weights for its CPU library by itself, but not inside a loop.
    turned = jnp.transpose(weight, (2, 3, 1, 0))
    return lax.conv_general_dilated(
        x, turned, (stride, stride), (around, around), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class Conv(nnx.Module):
    """A convolution over maps, with bias; parameters and products in `dtype`."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int = 3, *, stride=1, padding=None, dtype):
        self.weight = parameter(dim_out, dim_in, kernel, kernel, dtype=dtype)
        self.bias = parameter(dim_out, dtype=dtype)
        self.stride, self.padding = stride, padding

    def __call__(self, x: jax.Array) -> jax.Array:
        return convolve(x, self.weight[...], self.stride, self.padding) + self.bias[...]


class Downsample(nnx.Module):
    """Halves height and width by a convolution that is padded with zeros below and on the right only."""

    def __init__(self, dim: int, *, dtype):
        self.conv = Conv(dim, dim, stride=2, padding=(0, 1), dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles height and width: each pixel becomes four, then a convolution follows."""

    def __init__(self, dim_in: int, dim_out: int, *, dtype):
        self.conv = Conv(dim_in, dim_out, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        n, h, w, c = x.shape
        # One broadcast costs less than repeating along one axis after the other.
        fourfold = jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c))
        return self.conv(fourfold.reshape(n, 2 * h, 2 * w, c))


class GroupNorm(nnx.Module):
    """Normalises maps over height, width and the channels of a group; statistics in float32."""

    def __init__(self, groups: int, dim: int, *, dtype):
        self.groups = groups
        self.weight = parameter(dim, dtype=dtype)
        self.bias = parameter(dim, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        exact = x.astype(jnp.float32)
        centred = exact - self._mean(exact)
        scale = lax.rsqrt(self._mean(jnp.square(centred)) + EPSILON) * self.weight[...].astype(jnp.float32)
        return (centred * scale + self.bias[...].astype(jnp.float32)).astype(x.dtype)

    def _mean(self, x: jax.Array) -> jax.Array:
        """The mean of each channel's group, `[N, 1, 1, C]`. The mean over pixels comes first, then the mean
        over a group: on a CPU this is several times faster than both at once.
        """
        channels = x.mean((1, 2))
        groups = channels.reshape(len(x), self.groups, -1).mean(-1)
        return jnp.repeat(groups, x.shape[-1] // self.groups, axis=-1)[:, None, None]
