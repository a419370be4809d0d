"""Causal autoencoders of videos: AutoencoderKLWan (Wan 2.1) and AutoencoderKLQwenImage, one architecture.

Source: Wan, arXiv 2503.20314, section 4.1. A frame sees itself and earlier ones only, so a video goes through
in chunks: its first frame alone, which is one latent frame, then `frames_per_latent` frames to a latent frame.
What a chunk needs of the ones before it, the last frames before each convolution over time, is carried from
chunk to chunk; every chunk but the first is therefore the same computation, whatever the video's length.
`convert/vae_video.py` says which official key fills which parameter.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspd.errors import UsageError
from jaxspd.models.vae.config import read
from jaxspd.models.vae.layers import Conv, Downsample, Upsample, attend, convolve, numbered

# Earlier frames that a convolution over three sees.
EARLIER = 2
LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True)
class VideoAutoencoderConfig:
    """The fields of `vae/config.json`, with the names and defaults of AutoencoderKLWan."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    in_channels: int = 3
    out_channels: int = 3
    latents_mean: tuple[float, ...] = LATENTS_MEAN
    latents_std: tuple[float, ...] = LATENTS_STD

    @property
    def scale(self) -> int:
        """Pixels along an edge of a latent."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def frames_per_latent(self) -> int:
        """Frames of a latent frame, other than the first."""
        return 2 ** sum(self.temperal_downsample)


def read_video_config(given: Mapping[str, Any]) -> VideoAutoencoderConfig:
    """The configuration in the object of a `config.json`; UsageError for what is not understood."""
    given = dict(given)
    if given.get("is_residual"):
        raise UsageError("this checkpoint's VAE is Wan 2.2 5B's, which jaxspd cannot run; use Wan 2.1's")
    if "input_channels" in given:  # AutoencoderKLQwenImage's name for both
        given["in_channels"] = given["out_channels"] = given.pop("input_channels")
    fixed = {"patch_size": None, "attn_scales": []}
    if isinstance(given.get("attn_scales"), tuple):
        given["attn_scales"] = list(given["attn_scales"])
    unread = ("dropout", "is_residual", "scale_factor_temporal", "scale_factor_spatial")
    config = read(VideoAutoencoderConfig, given, fixed, unread)
    levels, channels = len(config.dim_mult), config.z_dim
    if len(config.temperal_downsample) != levels - 1:
        raise UsageError(
            f"vae/config.json: temperal_downsample must have {levels - 1} entries, one fewer than dim_mult"
        )
    if not len(config.latents_mean) == len(config.latents_std) == channels:
        raise UsageError(f"vae/config.json: latents_mean and latents_std must have {channels} entries (z_dim)")
    return config


class Earlier:
    """The last frames before each convolution over time, in the order of the convolutions.

    `state` is what the chunk before left, None before a video's first frame; `after` what this one leaves.
    """

    def __init__(self, state: tuple[jax.Array, ...] | None):
        self.first = state is None
        self._before = iter(state or ())
        self.after: list[jax.Array] = []

    def join(self, x: jax.Array, count: int) -> jax.Array:
        """`x` `[B, T, H, W, C]` behind the `count` frames before it, of which the last `count` are kept."""
        joined = jnp.concatenate([next(self._before), x], axis=1)
        self.after.append(joined[:, -count:])
        return joined

    def keep(self, x: jax.Array, count: int) -> None:
        """Keeps the last `count` frames of a beginning: what is missing is zero."""
        self.after.append(jnp.pad(x, ((0, 0), (count - x.shape[1], 0), *[(0, 0)] * 3)))


def each_frame(layer, x: jax.Array) -> jax.Array:
    """`layer`, of maps `[N, H, W, C]`, applied to all frames `[B, T, H, W, C]`."""
    y = layer(x.reshape(-1, *x.shape[2:]))
    return y.reshape(*x.shape[:2], *y.shape[1:])


class CausalConv(nnx.Module):
    """A convolution over this frame and the two before it. Weight `[out, in, 3, k, k]`."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int = 3, *, dtype, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(in_axis=range(1, 5), out_axis=0)
        shape = (dim_out, dim_in, 1 + EARLIER, kernel, kernel)
        self.weight = nnx.Param(init(rngs.params(), shape, dtype))
        self.bias = nnx.Param(jnp.zeros(dim_out, dtype))

    def __call__(self, x: jax.Array, earlier: Earlier) -> jax.Array:
        """`[B, T, H, W, in]` to `[B, T, H, W, out]`."""
        if not earlier.first:
            return self.over(earlier.join(x, EARLIER), x.shape[1])
        # Of a beginning, one frame, two thirds of the weight would meet zeros.
        earlier.keep(x, EARLIER)
        weight = self.weight[...][:, :, -1]
        return each_frame(lambda maps: convolve(maps, weight), x) + self.bias[...]

    def over(self, joined: jax.Array, count: int, stride: int = 1) -> jax.Array:
        """`count` frames, `stride` apart, of `joined` `[B, T, H, W, in]`.

        As three convolutions over maps: XLA is slower at those over volumes, on a CPU twofold.
        """
        total = self.bias[...]
        for number in range(1 + EARLIER):
            frames = joined[:, number : number + stride * (count - 1) + 1 : stride]
            weight = self.weight[...][:, :, number]
            total = total + each_frame(lambda maps, w=weight: convolve(maps, w), frames)
        return total


class PointwiseConv(nnx.Module):
    """A linear map of channels, stored as a convolution: weight `[out, in, 1, 1, 1]`."""

    def __init__(self, dim_in: int, dim_out: int, *, dtype, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(in_axis=1, out_axis=0)
        self.weight = nnx.Param(init(rngs.params(), (dim_out, dim_in, 1, 1, 1), dtype))
        self.bias = nnx.Param(jnp.zeros(dim_out, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("...i,oi->...o", x, self.weight[...][:, :, 0, 0, 0]) + self.bias[...]


class RmsNorm(nnx.Module):
    """Each pixel's channels scaled to a mean square of one, then by a weight; in float32.

    The weight has `axes` axes of one behind its channels, as stored.
    """

    def __init__(self, dim: int, axes: int, *, dtype):
        self.gamma = nnx.Param(jnp.ones((dim, *[1] * axes), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        exact = x.astype(jnp.float32)
        # The official bound, of the channels' root of summed squares.
        norm = jnp.maximum(jnp.linalg.norm(exact, axis=-1, keepdims=True), 1e-12)
        gamma = self.gamma[...].astype(jnp.float32).reshape(-1)
        return (exact / norm * (sqrt(x.shape[-1]) * gamma)).astype(x.dtype)


class Resnet(nnx.Module):
    """Two causal convolutions of what is normalised, beside a straight connection."""

    def __init__(self, dim_in: int, dim_out: int, *, dtype, rngs):
        self.norm1 = RmsNorm(dim_in, 3, dtype=dtype)
        self.conv1 = CausalConv(dim_in, dim_out, dtype=dtype, rngs=rngs)
        self.norm2 = RmsNorm(dim_out, 3, dtype=dtype)
        self.conv2 = CausalConv(dim_out, dim_out, dtype=dtype, rngs=rngs)
        self.shortcut = None if dim_in == dim_out else PointwiseConv(dim_in, dim_out, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, earlier: Earlier) -> jax.Array:
        hidden = self.conv1(jax.nn.silu(self.norm1(x)), earlier)
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)), earlier)
        return hidden + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
    """Every pixel of a frame attends to every other of the same frame, with one head."""

    def __init__(self, dim: int, *, dtype, rngs):
        self.norm = RmsNorm(dim, 2, dtype=dtype)
        self.qkv = Conv(dim, 3 * dim, 1, dtype=dtype, rngs=rngs)
        self.out = Conv(dim, dim, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        def frames(maps: jax.Array) -> jax.Array:
            qkv = self.qkv(self.norm(maps)).reshape(len(maps), -1, 3 * maps.shape[-1])
            return self.out(attend(*jnp.split(qkv, 3, axis=-1)).reshape(maps.shape))

        return x + each_frame(frames, x)


class Middle(nnx.Module):
    """Resnet, attention, resnet, on the coarsest maps."""

    def __init__(self, dim: int, *, dtype, rngs):
        self.before = Resnet(dim, dim, dtype=dtype, rngs=rngs)
        self.attention = Attention(dim, dtype=dtype, rngs=rngs)
        self.after = Resnet(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, earlier: Earlier) -> jax.Array:
        return self.after(self.attention(self.before(x, earlier)), earlier)


class Down(nnx.Module):
    """Half the height and width and, where `time`, half the frames of every chunk but the first."""

    def __init__(self, dim: int, time: bool, *, dtype, rngs):
        self.space = Downsample(dim, dtype=dtype, rngs=rngs)
        self.time = CausalConv(dim, dim, 1, dtype=dtype, rngs=rngs) if time else None

    def __call__(self, x: jax.Array, earlier: Earlier) -> jax.Array:
        x = each_frame(self.space, x)
        if self.time is None:
            return x
        if earlier.first:
            earlier.keep(x, 1)
            return x
        return self.time.over(earlier.join(x, 1), x.shape[1] // 2, stride=2)


class Up(nnx.Module):
    """Twice the height and width, half the channels and, where `time`, twice the frames of every chunk but
    the first.
    """

    def __init__(self, dim: int, time: bool, *, dtype, rngs):
        self.space = Upsample(dim, dim // 2, dtype=dtype, rngs=rngs)
        self.time = CausalConv(dim, 2 * dim, 1, dtype=dtype, rngs=rngs) if time else None

    def __call__(self, x: jax.Array, earlier: Earlier) -> jax.Array:
        if self.time is not None and earlier.first:
            # The first frame is not seen by what doubles the later ones.
            earlier.keep(x[:, :0], EARLIER)
        elif self.time is not None:
            b, t, h, w, c = x.shape
            halves = self.time(x, earlier).reshape(b, t, h, w, 2, c)
            x = jnp.moveaxis(halves, 4, 2).reshape(b, 2 * t, h, w, c)
        return each_frame(self.space, x)


class Level(nnx.Module):
    """A row of resnets at one resolution, then the change to the next."""

    def __init__(self, dim_in: int, dim_out: int, length: int, resample, *, dtype, rngs):
        self.resnets = numbered(
            Resnet(dim_out if number else dim_in, dim_out, dtype=dtype, rngs=rngs) for number in range(length)
        )
        self.resample = resample

    def __call__(self, x: jax.Array, earlier: Earlier) -> jax.Array:
        for resnet in self.resnets.values():
            x = resnet(x, earlier)
        return x if self.resample is None else self.resample(x, earlier)


class Encoder(nnx.Module):
    """Frames `[B, T, H, W, in_channels]` to mean and log variance `[B, t, h, w, 2 z_dim]`."""

    def __init__(self, config: VideoAutoencoderConfig, *, dtype, rngs):
        widths = [config.base_dim * factor for factor in config.dim_mult]
        self.conv_in = CausalConv(config.in_channels, config.base_dim, dtype=dtype, rngs=rngs)
        levels = []
        for before, width in zip((config.base_dim, *widths), widths, strict=False):
            last = len(levels) == len(widths) - 1
            time = not last and config.temperal_downsample[len(levels)]
            down = None if last else Down(width, time, dtype=dtype, rngs=rngs)
            levels.append(Level(before, width, config.num_res_blocks, down, dtype=dtype, rngs=rngs))
        self.levels = numbered(levels)
        self.middle = Middle(widths[-1], dtype=dtype, rngs=rngs)
        self.norm_out = RmsNorm(widths[-1], 3, dtype=dtype)
        self.conv_out = CausalConv(widths[-1], 2 * config.z_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, earlier: Earlier) -> jax.Array:
        x = self.conv_in(x, earlier)
        for level in self.levels.values():
            x = level(x, earlier)
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x, earlier))), earlier)


class Decoder(nnx.Module):
    """Latents `[B, t, h, w, z_dim]` to frames `[B, T, H, W, out_channels]`."""

    def __init__(self, config: VideoAutoencoderConfig, *, dtype, rngs):
        base = config.decoder_base_dim or config.base_dim
        widths = [base * factor for factor in config.dim_mult[::-1]]
        self.conv_in = CausalConv(config.z_dim, widths[0], dtype=dtype, rngs=rngs)
        self.middle = Middle(widths[0], dtype=dtype, rngs=rngs)
        levels, before = [], widths[0]
        for width in widths:
            last = len(levels) == len(widths) - 1
            time = not last and config.temperal_downsample[::-1][len(levels)]
            up = None if last else Up(width, time, dtype=dtype, rngs=rngs)
            levels.append(Level(before, width, config.num_res_blocks + 1, up, dtype=dtype, rngs=rngs))
            before = width // 2
        self.levels = numbered(levels)
        self.norm_out = RmsNorm(widths[-1], 3, dtype=dtype)
        self.conv_out = CausalConv(widths[-1], config.out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, earlier: Earlier) -> jax.Array:
        x = self.middle(self.conv_in(x, earlier), earlier)
        for level in self.levels.values():
            x = level(x, earlier)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), earlier)


class VideoAutoencoder(nnx.Module):
    """Encoder and decoder of one chunk. `dtype` is that of weights, convolutions and what is carried; norms
    and softmax are in float32.
    """

    def __init__(self, config: VideoAutoencoderConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.quant_conv = PointwiseConv(2 * config.z_dim, 2 * config.z_dim, dtype=dtype, rngs=rngs)
        self.post_quant_conv = PointwiseConv(config.z_dim, config.z_dim, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)

    def encode(self, pixels: jax.Array, state: tuple | None = None) -> tuple[jax.Array, tuple]:
        """The posterior's mode `[B, C, 1, h, w]`, float32, not normalised, of a chunk of pixels
        `[B, T, H, W, 3]` in [-1, 1], and what the next chunk wants as `state`.

        The first chunk is one frame, without `state`; every other is `config.frames_per_latent` frames.
        """
        earlier = Earlier(state)
        x = self.quant_conv(self.encoder(pixels.astype(self.dtype), earlier))
        mode = jnp.moveaxis(x[..., : self.config.z_dim], -1, 1).astype(jnp.float32)
        return mode, tuple(earlier.after)

    def decode(self, latents: jax.Array, state: tuple | None = None) -> tuple[jax.Array, tuple]:
        """Pixels `[B, T, H, W, 3]`, float32, of a chunk of latents `[B, C, 1, h, w]` that are not normalised,
        and what the next chunk wants as `state`: `encode`'s reverse. They lie about [-1, 1]; the caller cuts
        off what lies beyond.
        """
        earlier = Earlier(state)
        x = self.post_quant_conv(jnp.moveaxis(latents, 1, -1).astype(self.dtype))
        return self.decoder(x, earlier).astype(jnp.float32), tuple(earlier.after)

    def normalise(self, latents: jax.Array) -> jax.Array:
        """Raw latents `[B, C, t, h, w]` as the transformer knows them."""
        return (latents - _by_channel(self.config.latents_mean)) / _by_channel(self.config.latents_std)

    def denormalise(self, latents: jax.Array) -> jax.Array:
        """The transformer's latents as the decoder knows them."""
        return latents * _by_channel(self.config.latents_std) + _by_channel(self.config.latents_mean)


def _by_channel(values: tuple[float, ...]) -> np.ndarray:
    return np.asarray(values, np.float32)[:, None, None, None]
