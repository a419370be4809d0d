"""Causal autoencoders of videos: AutoencoderKLWan (Wan 2.1) and AutoencoderKLQwenImage, one architecture.

Source: Wan, arXiv 2503.20314, section 4.1. A frame sees itself and earlier ones only, so a video goes through
in chunks: its first frame alone, which is a latent frame, then `frames_per_latent` frames to a latent frame.
What a chunk needs of the ones before it, the last frames before each convolution over time, is carried from
chunk to chunk; every chunk but the first is therefore the same computation, whatever the video's length.
`convert/vae_video.py` says which official key fills which parameter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspd.errors import UsageError
from jaxspd.models.attention import single_head_attention
from jaxspd.models.vae.causal import (
    EARLIER,
    CausalConv,
    Earlier,
    PointwiseConv,
    RmsNorm,
    each_frame,
    frame_by_frame,
)
from jaxspd.models.vae.config import read
from jaxspd.models.vae.layers import Conv, Downsample, Upsample

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
    decoder_base_dim: int | None = field(default=None, metadata={"example": 96})
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
        raise UsageError(
            f"vae/config.json: latents_mean and latents_std must have {channels} entries (z_dim)"
        )
    return config


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
            return self.out(single_head_attention(*jnp.split(qkv, 3, axis=-1)).reshape(maps.shape))

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
    """Half the height and width and, where there is `time`, half the frames of every chunk but the first."""

    def __init__(self, dim: int, time: bool, *, dtype, rngs):
        self.space = Downsample(dim, dtype=dtype, rngs=rngs)
        self.time = CausalConv(dim, dim, 1, dtype=dtype, rngs=rngs) if time else None

    def shorten(self, x: jax.Array, earlier: Earlier) -> jax.Array:
        if self.time is None:
            return x
        if earlier.first:
            earlier.keep(x, 1)
            return x
        return self.time.over(earlier.join(x, 1), x.shape[1] // 2, stride=2)


class Up(nnx.Module):
    """Twice the height and width, half the channels and, where there is `time`, twice the frames of every
    chunk but the first.
    """

    def __init__(self, dim: int, time: bool, *, dtype, rngs):
        self.space = Upsample(dim, dim // 2, dtype=dtype, rngs=rngs)
        self.time = CausalConv(dim, 2 * dim, 1, dtype=dtype, rngs=rngs) if time else None

    def lengthen(self, x: jax.Array, earlier: Earlier) -> jax.Array:
        if self.time is None:
            return x
        if earlier.first:
            # The first frame is not seen by what doubles the later ones.
            earlier.keep(x[:, :0], EARLIER)
            return x
        b, t, h, w, c = x.shape
        halves = self.time(x, earlier).reshape(b, t, h, w, 2, c)
        return jnp.moveaxis(halves, 4, 2).reshape(b, 2 * t, h, w, c)


class Level(nnx.Module):
    """A row of resnets at one resolution."""

    def __init__(self, dim_in: int, dim_out: int, length: int, *, dtype, rngs):
        self.resnets = nnx.List(
            Resnet(dim_out if number else dim_in, dim_out, dtype=dtype, rngs=rngs) for number in range(length)
        )

    def __call__(self, x: jax.Array, earlier: Earlier) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x, earlier)
        return x


class Encoder(nnx.Module):
    """Frames `[B, T, H, W, in_channels]` to mean and log variance `[B, t, h, w, 2 z_dim]`."""

    def __init__(self, config: VideoAutoencoderConfig, *, dtype, rngs):
        widths = [config.base_dim * factor for factor in config.dim_mult]
        self.conv_in = CausalConv(config.in_channels, config.base_dim, dtype=dtype, rngs=rngs)
        self.levels = nnx.List(
            Level(before, width, config.num_res_blocks, dtype=dtype, rngs=rngs)
            for before, width in zip((config.base_dim, *widths), widths, strict=False)
        )
        self.downs = nnx.List(
            Down(width, time, dtype=dtype, rngs=rngs)
            for width, time in zip(widths, config.temperal_downsample, strict=False)
        )
        self.middle = Middle(widths[-1], dtype=dtype, rngs=rngs)
        self.norm_out = RmsNorm(widths[-1], 3, dtype=dtype)
        self.conv_out = CausalConv(widths[-1], 2 * config.z_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, earlier: Earlier) -> jax.Array:
        downs = [*self.downs, None]
        for number, (level, down) in enumerate(zip(self.levels, downs, strict=True)):

            def maps(x, earlier, level=level, first=number == 0, down=down):
                x = level(self.conv_in(x, earlier) if first else x, earlier)
                return x if down is None else each_frame(down.space, x)

            x = frame_by_frame(maps, x, earlier)
            x = x if down is None else down.shorten(x, earlier)
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x, earlier))), earlier)


class Decoder(nnx.Module):
    """Latents `[B, t, h, w, z_dim]` to frames `[B, T, H, W, out_channels]`."""

    def __init__(self, config: VideoAutoencoderConfig, *, dtype, rngs):
        base = config.decoder_base_dim or config.base_dim
        widths = [base * factor for factor in config.dim_mult[::-1]]
        self.conv_in = CausalConv(config.z_dim, widths[0], dtype=dtype, rngs=rngs)
        self.middle = Middle(widths[0], dtype=dtype, rngs=rngs)
        befores = (widths[0], *(width // 2 for width in widths))
        self.levels = nnx.List(
            Level(before, width, config.num_res_blocks + 1, dtype=dtype, rngs=rngs)
            for before, width in zip(befores, widths, strict=False)
        )
        # The changes of resolution between levels.
        self.ups = nnx.List(
            Up(width, time, dtype=dtype, rngs=rngs)
            for width, time in zip(widths, config.temperal_downsample[::-1], strict=False)
        )
        self.norm_out = RmsNorm(widths[-1], 3, dtype=dtype)
        self.conv_out = CausalConv(widths[-1], config.out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, earlier: Earlier) -> jax.Array:
        x, ups = self.middle(self.conv_in(x, earlier), earlier), [None, *self.ups]
        end = len(self.ups)
        for number, (level, up) in enumerate(zip(self.levels, ups, strict=True)):

            def maps(x, earlier, level=level, up=up, last=number == end):
                x = level(x if up is None else each_frame(up.space, x), earlier)
                return self.conv_out(jax.nn.silu(self.norm_out(x)), earlier) if last else x

            x = x if up is None else up.lengthen(x, earlier)
            x = frame_by_frame(maps, x, earlier)
        return x


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
