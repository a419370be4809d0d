"""Causal autoencoders of videos: AutoencoderKLWan (Wan 2.1) and AutoencoderKLQwenImage, one architecture.

Source: Wan, arXiv 2503.20314, section 4.1. A frame depends only on itself and earlier frames, so a video is
coded in chunks. The first chunk is one frame and becomes one latent frame; every other is `frames_per_latent`
frames to one latent frame. A chunk needs the last frames before each convolution over time, so these are
carried from chunk to chunk. Therefore all chunks but the first run the same computation, whatever the video's
length. `convert/vae_video.py` says which official key fills which parameter.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspd.models.kernels.xla import single_head_attention
from jaxspd.models.vae.causal import (
    EARLIER,
    CausalConv,
    ChannelNorm,
    Earlier,
    PointwiseConv,
    each_frame,
    frame_by_frame,
)
from jaxspd.models.vae.layers import Conv, Downsample, Upsample
from jaxspd.models.vae.video_config import VideoAutoencoderConfig


class Resnet(nnx.Module):
    """Two causal convolutions, each of normalised maps, added to a shortcut."""

    def __init__(self, dim_in: int, dim_out: int, *, dtype):
        self.norm1 = ChannelNorm(dim_in, 3, dtype=dtype)
        self.conv1 = CausalConv(dim_in, dim_out, dtype=dtype)
        self.norm2 = ChannelNorm(dim_out, 3, dtype=dtype)
        self.conv2 = CausalConv(dim_out, dim_out, dtype=dtype)
        self.shortcut = None if dim_in == dim_out else PointwiseConv(dim_in, dim_out, dtype=dtype)

    def __call__(self, x: jax.Array, earlier: Earlier) -> jax.Array:
        hidden = self.conv1(jax.nn.silu(self.norm1(x)), earlier)
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)), earlier)
        return hidden + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
    """Every pixel of a frame attends to every other of the same frame, with one head."""

    def __init__(self, dim: int, *, dtype):
        self.norm = ChannelNorm(dim, 2, dtype=dtype)
        self.qkv = Conv(dim, 3 * dim, 1, dtype=dtype)
        self.out = Conv(dim, dim, 1, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        def frames(maps: jax.Array) -> jax.Array:
            qkv = self.qkv(self.norm(maps)).reshape(len(maps), -1, 3 * maps.shape[-1])
            return self.out(single_head_attention(*jnp.split(qkv, 3, axis=-1)).reshape(maps.shape))

        return x + each_frame(frames, x)


class Middle(nnx.Module):
    """Resnet, attention, resnet, on the coarsest maps."""

    def __init__(self, dim: int, *, dtype):
        self.before = Resnet(dim, dim, dtype=dtype)
        self.attention = Attention(dim, dtype=dtype)
        self.after = Resnet(dim, dim, dtype=dtype)

    def __call__(self, x: jax.Array, earlier: Earlier) -> jax.Array:
        return self.after(self.attention(self.before(x, earlier)), earlier)


class Down(nnx.Module):
    """Halves height and width. If `time`, also halves the frames of every chunk but the first."""

    def __init__(self, dim: int, time: bool, *, dtype):
        self.space = Downsample(dim, dtype=dtype)
        self.time = CausalConv(dim, dim, 1, dtype=dtype) if time else None

    def shorten(self, x: jax.Array, earlier: Earlier) -> jax.Array:
        if self.time is None:
            return x
        if earlier.first:
            earlier.keep(x, 1)
            return x
        return self.time.over(earlier.join(x, 1), x.shape[1] // 2, stride=2)


class Up(nnx.Module):
    """Doubles height and width and halves the channels. If `time`, also doubles the frames of every chunk but
    the first.
    """

    def __init__(self, dim: int, time: bool, *, dtype):
        self.space = Upsample(dim, dim // 2, dtype=dtype)
        self.time = CausalConv(dim, 2 * dim, 1, dtype=dtype) if time else None

    def lengthen(self, x: jax.Array, earlier: Earlier) -> jax.Array:
        if self.time is None:
            return x
        if earlier.first:
            # The convolution that doubles later frames does not see the first frame.
            earlier.keep(x[:, :0], EARLIER)
            return x
        b, t, h, w, c = x.shape
        halves = self.time(x, earlier).reshape(b, t, h, w, 2, c)
        return jnp.moveaxis(halves, 4, 2).reshape(b, 2 * t, h, w, c)


class Level(nnx.Module):
    """A row of resnets at one resolution."""

    def __init__(self, dim_in: int, dim_out: int, length: int, *, dtype):
        self.resnets = nnx.List(
            Resnet(dim_out if number else dim_in, dim_out, dtype=dtype) for number in range(length)
        )

    def __call__(self, x: jax.Array, earlier: Earlier) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x, earlier)
        return x


class Encoder(nnx.Module):
    """Frames `[B, T, H, W, in_channels]` to mean and log variance `[B, t, h, w, 2 z_dim]`."""

    def __init__(self, config: VideoAutoencoderConfig, *, dtype):
        widths = [config.base_dim * factor for factor in config.dim_mult]
        self.conv_in = CausalConv(config.in_channels, config.base_dim, dtype=dtype)
        self.levels = nnx.List(
            Level(before, width, config.num_res_blocks, dtype=dtype)
            for before, width in zip((config.base_dim, *widths), widths, strict=False)
        )
        self.downs = nnx.List(
            Down(width, time, dtype=dtype)
            for width, time in zip(widths, config.temperal_downsample, strict=False)
        )
        self.middle = Middle(widths[-1], dtype=dtype)
        self.norm_out = ChannelNorm(widths[-1], 3, dtype=dtype)
        self.conv_out = CausalConv(widths[-1], 2 * config.z_dim, dtype=dtype)

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

    def __init__(self, config: VideoAutoencoderConfig, *, dtype):
        base = config.decoder_base_dim or config.base_dim
        widths = [base * factor for factor in config.dim_mult[::-1]]
        self.conv_in = CausalConv(config.z_dim, widths[0], dtype=dtype)
        self.middle = Middle(widths[0], dtype=dtype)
        befores = (widths[0], *(width // 2 for width in widths))
        self.levels = nnx.List(
            Level(before, width, config.num_res_blocks + 1, dtype=dtype)
            for before, width in zip(befores, widths, strict=False)
        )
        # Each doubles the resolution between two levels.
        self.ups = nnx.List(
            Up(width, time, dtype=dtype)
            for width, time in zip(widths, config.temperal_downsample[::-1], strict=False)
        )
        self.norm_out = ChannelNorm(widths[-1], 3, dtype=dtype)
        self.conv_out = CausalConv(widths[-1], config.out_channels, dtype=dtype)

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
    """Encoder and decoder of one chunk. Weights, convolutions and the carried state are in `dtype`; norms and
    softmax are in float32.
    """

    def __init__(self, config: VideoAutoencoderConfig, *, dtype=jnp.float32):
        self.config, self.dtype = config, dtype
        self.encoder = Encoder(config, dtype=dtype)
        self.quant_conv = PointwiseConv(2 * config.z_dim, 2 * config.z_dim, dtype=dtype)
        self.post_quant_conv = PointwiseConv(config.z_dim, config.z_dim, dtype=dtype)
        self.decoder = Decoder(config, dtype=dtype)

    def encode(self, pixels: jax.Array, state: tuple | None = None) -> tuple[jax.Array, tuple]:
        """The posterior's mode `[B, C, 1, h, w]`, float32, not normalised, of a chunk of pixels
        `[B, T, H, W, 3]` in [-1, 1], and the `state` for the next chunk.

        The first chunk is one frame, without `state`; every other is `config.frames_per_latent` frames.
        """
        earlier = Earlier(state)
        x = self.quant_conv(self.encoder(pixels.astype(self.dtype), earlier))
        mode = jnp.moveaxis(x[..., : self.config.z_dim], -1, 1).astype(jnp.float32)
        return mode, tuple(earlier.after)

    def decode(self, latents: jax.Array, state: tuple | None = None) -> tuple[jax.Array, tuple]:
        """Pixels `[B, T, H, W, 3]`, float32, of a chunk of latents `[B, C, 1, h, w]` that are not normalised,
        and the `state` for the next chunk: the reverse of `encode`. Most pixels lie in [-1, 1]; the caller
        clips the others.
        """
        earlier = Earlier(state)
        x = self.post_quant_conv(jnp.moveaxis(latents, 1, -1).astype(self.dtype))
        return self.decoder(x, earlier).astype(jnp.float32), tuple(earlier.after)

    def normalise(self, latents: jax.Array) -> jax.Array:
        """Raw latents `[B, C, t, h, w]` in the transformer's scale, same shape."""
        return (latents - _by_channel(self.config.latents_mean)) / _by_channel(self.config.latents_std)

    def denormalise(self, latents: jax.Array) -> jax.Array:
        """The transformer's latents as raw latents for the decoder: the reverse of `normalise`."""
        return latents * _by_channel(self.config.latents_std) + _by_channel(self.config.latents_mean)


def _by_channel(values: tuple[float, ...]) -> np.ndarray:
    return np.asarray(values, np.float32)[:, None, None, None]
