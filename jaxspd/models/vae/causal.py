"""Layers of a causal autoencoder, and the frames that they carry from one chunk of a video to the next."""

from collections.abc import Callable
from math import sqrt

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspd.models.layers import parameter
from jaxspd.models.vae.layers import convolve

# A convolution over three frames sees this many earlier frames.
EARLIER = 2


class Earlier:
    """The last frames before each convolution over time, in the order of the convolutions.

    `state` is what the previous chunk left, None before a video's first frame. `after` is what this chunk
    leaves. Both are tuples of arrays, with a nested tuple for each layer that runs frame by frame.
    """

    def __init__(self, state: tuple | None):
        self.first = state is None
        self.before = iter(state or ())
        self.after: list = []

    def nested(self, call: Callable[["Earlier"], jax.Array]) -> jax.Array:
        """The result of `call`, which gets a nested tuple of its own."""
        inner = Earlier(None if self.first else next(self.before))
        y = call(inner)
        self.after.append(tuple(inner.after))
        return y

    def join(self, x: jax.Array, count: int) -> jax.Array:
        """`x` `[B, T, H, W, C]` after the `count` frames before it. Keeps the last `count` frames of the
        result.
        """
        joined = jnp.concatenate([next(self.before), x], axis=1)
        self.after.append(joined[:, -count:])
        return joined

    def keep(self, x: jax.Array, count: int) -> None:
        """Keeps the last `count` frames of `x`, with which a video begins; zeros stand for missing frames."""
        self.after.append(jnp.pad(x, ((0, 0), (count - x.shape[1], 0), *[(0, 0)] * 3)))


def frame_by_frame(layer, x: jax.Array, earlier: Earlier) -> jax.Array:
    """`layer(frame, earlier)` for each frame of `x` `[B, T, H, W, C]` in turn.

    The finest maps take the most memory, so no more than one frame of them is held at once.
    """
    if x.shape[1] == 1:
        return earlier.nested(lambda inner: layer(x, inner))

    def one(state, frame: jax.Array):
        inner = Earlier(state)
        y = layer(frame[:, None], inner)
        return tuple(inner.after), y[:, 0]

    state, frames = jax.lax.scan(one, next(earlier.before), jnp.moveaxis(x, 1, 0))
    earlier.after.append(state)
    return jnp.moveaxis(frames, 0, 1)


def each_frame(layer, x: jax.Array) -> jax.Array:
    """`layer`, which takes maps `[N, H, W, C]`, applied to all frames `[B, T, H, W, C]`."""
    y = layer(x.reshape(-1, *x.shape[2:]))
    return y.reshape(*x.shape[:2], *y.shape[1:])


class CausalConv(nnx.Module):
    """A convolution over this frame and the two before it. Weight `[out, in, 3, k, k]`."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int = 3, *, dtype):
        self.weight = parameter(dim_out, dim_in, 1 + EARLIER, kernel, kernel, dtype=dtype)
        self.bias = parameter(dim_out, dtype=dtype)

    def __call__(self, x: jax.Array, earlier: Earlier) -> jax.Array:
        """`[B, T, H, W, in]` to `[B, T, H, W, out]`."""
        if not earlier.first:
            return self.over(earlier.join(x, EARLIER), x.shape[1])
        # A video begins with one frame. Two thirds of the weight would be multiplied by zeros.
        earlier.keep(x, EARLIER)
        weight = self.weight[...][:, :, -1]
        return each_frame(lambda maps: convolve(maps, weight), x) + self.bias[...]

    def over(self, joined: jax.Array, count: int, stride: int = 1) -> jax.Array:
        """`count` output frames, from frames of `joined` `[B, T, H, W, in]` that start `stride` apart.

        This is computed as three convolutions over maps: XLA's convolutions over volumes are slower: on a CPU
        they take twice as long.
        """
        total = self.bias[...]
        for number in range(1 + EARLIER):
            frames = joined[:, number : number + stride * (count - 1) + 1 : stride]
            weight = self.weight[...][:, :, number]
            total = total + each_frame(lambda maps, w=weight: convolve(maps, w), frames)
        return total


class PointwiseConv(nnx.Module):
    """A linear map of channels, stored as a convolution: weight `[out, in, 1, 1, 1]`."""

    def __init__(self, dim_in: int, dim_out: int, *, dtype):
        self.weight = parameter(dim_out, dim_in, 1, 1, 1, dtype=dtype)
        self.bias = parameter(dim_out, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("...i,oi->...o", x, self.weight[...][:, :, 0, 0, 0]) + self.bias[...]


class ChannelNorm(nnx.Module):
    """Scales each pixel's channels to a mean square of one, then by a weight, in float32.

    The weight has `axes` axes of size one after its channels, as checkpoints store it.
    """

    def __init__(self, dim: int, axes: int, *, dtype):
        self.gamma = parameter(dim, *[1] * axes, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        exact = x.astype(jnp.float32)
        # The official lower bound of the channels' root of summed squares.
        norm = jnp.maximum(jnp.linalg.norm(exact, axis=-1, keepdims=True), 1e-12)
        gamma = self.gamma[...].astype(jnp.float32).reshape(-1)
        return (exact / norm * (sqrt(x.shape[-1]) * gamma)).astype(x.dtype)
