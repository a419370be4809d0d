"""Autoencoders of pictures: AutoencoderKL (FLUX.1, Z-Image) and AutoencoderKLFlux2.

Sources: latent diffusion, arXiv 2112.10752; Black Forest Labs, FLUX.1 (2024) and FLUX.2 (2025).
`convert/vae_image.py` says which official key fills which parameter.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspd.models.kernels.xla import single_head_attention
from jaxspd.models.layers import Linear, parameter
from jaxspd.models.packing import patchify, unpatchify
from jaxspd.models.vae.image_config import AutoencoderKLFlux2Config
from jaxspd.models.vae.layers import Conv, Downsample, GroupNorm, Upsample


class Resnet(nnx.Module):
    """Two convolutions, each of normalised maps, added to a shortcut (arXiv 1512.03385)."""

    def __init__(self, dim_in: int, dim_out: int, groups: int, *, dtype):
        self.norm1 = GroupNorm(groups, dim_in, dtype=dtype)
        self.conv1 = Conv(dim_in, dim_out, dtype=dtype)
        self.norm2 = GroupNorm(groups, dim_out, dtype=dtype)
        self.conv2 = Conv(dim_out, dim_out, dtype=dtype)
        self.shortcut = None if dim_in == dim_out else Conv(dim_in, dim_out, 1, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return hidden + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
    """Every pixel of a map attends to every other, with one head."""

    def __init__(self, dim: int, groups: int, *, dtype):
        self.norm = GroupNorm(groups, dim, dtype=dtype)
        self.q, self.k, self.v, self.out = (Linear(dim, dim, dtype=dtype) for _ in range(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        pixels = self.norm(x).reshape(len(x), -1, x.shape[-1])
        attended = single_head_attention(self.q(pixels), self.k(pixels), self.v(pixels))
        return x + self.out(attended).reshape(x.shape)


class Middle(nnx.Module):
    """Resnet, attention if `attends`, resnet; all on the coarsest maps."""

    def __init__(self, dim: int, groups: int, attends: bool, *, dtype):
        self.before = Resnet(dim, dim, groups, dtype=dtype)
        self.attention = Attention(dim, groups, dtype=dtype) if attends else None
        self.after = Resnet(dim, dim, groups, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.before(x)
        return self.after(x if self.attention is None else self.attention(x))


class Level(nnx.Module):
    """A row of resnets at one resolution, then the change to the next."""

    def __init__(self, dim_in: int, dim_out: int, length: int, groups: int, resample, *, dtype):
        self.resnets = nnx.List(
            Resnet(dim_out if number else dim_in, dim_out, groups, dtype=dtype) for number in range(length)
        )
        self.resample = resample

    def __call__(self, x: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.resample is None else self.resample(x)


class Encoder(nnx.Module):
    """Pixels `[N, H, W, in_channels]` to mean and log variance `[N, h, w, 2 latent_channels]`."""

    def __init__(self, config, *, dtype):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv(config.in_channels, widths[0], dtype=dtype)
        levels: list[Level] = []
        for before, width in zip((widths[0], *widths), widths, strict=False):
            last = len(levels) == len(widths) - 1
            down = None if last else Downsample(width, dtype=dtype)
            levels.append(Level(before, width, config.layers_per_block, groups, down, dtype=dtype))
        self.levels = nnx.List(levels)
        self.middle = Middle(widths[-1], groups, config.mid_block_add_attention, dtype=dtype)
        self.norm_out = GroupNorm(groups, widths[-1], dtype=dtype)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x))))


class Decoder(nnx.Module):
    """Latents `[N, h, w, latent_channels]` to pixels `[N, H, W, out_channels]`."""

    def __init__(self, config, *, dtype):
        widths, groups = config.decoder_channels[::-1], config.norm_num_groups
        self.conv_in = Conv(config.latent_channels, widths[0], dtype=dtype)
        self.middle = Middle(widths[0], groups, config.mid_block_add_attention, dtype=dtype)
        length = config.layers_per_block + 1
        levels: list[Level] = []
        for before, width in zip((widths[0], *widths), widths, strict=False):
            last = len(levels) == len(widths) - 1
            up = None if last else Upsample(width, width, dtype=dtype)
            levels.append(Level(before, width, length, groups, up, dtype=dtype))
        self.levels = nnx.List(levels)
        self.norm_out = GroupNorm(groups, widths[-1], dtype=dtype)
        self.conv_out = Conv(widths[-1], config.out_channels, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.middle(self.conv_in(x))
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class ImageAutoencoder(nnx.Module):
    """Encoder and decoder of pictures. Weights and convolutions are in `dtype`; the norms' statistics and
    softmax are in float32.
    """

    def __init__(self, config, *, dtype=jnp.float32):
        self.config, self.dtype = config, dtype
        self.encoder = Encoder(config, dtype=dtype)
        self.decoder = Decoder(config, dtype=dtype)
        channels = config.latent_channels

        def pointwise(wanted: bool, dim: int) -> Conv | None:
            return Conv(dim, dim, 1, dtype=dtype) if wanted else None

        self.quant_conv = pointwise(config.use_quant_conv, 2 * channels)
        self.post_quant_conv = pointwise(config.use_post_quant_conv, channels)

    def encode(self, pixels: jax.Array) -> jax.Array:
        """The posterior's mode `[B, C, h, w]`, float32, not normalised, of pixels `[B, H, W, 3]` in [-1, 1].
        H and W must be multiples of `config.scale`.
        """
        x = self.encoder(pixels.astype(self.dtype))
        x = x if self.quant_conv is None else self.quant_conv(x)
        return jnp.moveaxis(x[..., : self.config.latent_channels], -1, 1).astype(jnp.float32)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Pixels `[B, H, W, 3]`, float32, of latents `[B, C, h, w]` that are not normalised. Most pixels lie
        in [-1, 1]; the caller clips the others.
        """
        x = jnp.moveaxis(latents, 1, -1).astype(self.dtype)
        x = x if self.post_quant_conv is None else self.post_quant_conv(x)
        return self.decoder(x).astype(jnp.float32)


class AutoencoderKL(ImageAutoencoder):
    """The autoencoder of FLUX.1 and Z-Image. One shift and one scale normalise its latents for the
    transformer.
    """

    def normalise(self, latents: jax.Array) -> jax.Array:
        """Raw latents in the transformer's scale, same shape."""
        return (latents - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def denormalise(self, latents: jax.Array) -> jax.Array:
        """The transformer's latents as raw latents for the decoder: the reverse of `normalise`."""
        return latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)


class AutoencoderKLFlux2(ImageAutoencoder):
    """FLUX.2's autoencoder. Its latents for the transformer are patchified 2×2, `[B, 4C, h/2, w/2]`. Each
    channel is normalised by running statistics from training, which are kept in float32.
    """

    def __init__(self, config: AutoencoderKLFlux2Config, *, dtype=jnp.float32):
        super().__init__(config, dtype=dtype)
        self.mean = parameter(config.channels, dtype=jnp.float32)
        self.variance = parameter(config.channels, dtype=jnp.float32)

    def normalise(self, latents: jax.Array) -> jax.Array:
        """Raw latents `[B, C, h, w]` as the transformer's `[B, 4C, h/2, w/2]`."""
        mean, deviation = self._statistics()
        return (patchify(latents) - mean) / deviation

    def denormalise(self, latents: jax.Array) -> jax.Array:
        """The transformer's latents as raw latents for the decoder: the reverse of `normalise`."""
        mean, deviation = self._statistics()
        return unpatchify(latents * deviation + mean)

    def _statistics(self) -> tuple[jax.Array, jax.Array]:
        mean, variance = (values[...][:, None, None] for values in (self.mean, self.variance))
        return mean, jnp.sqrt(variance + self.config.batch_norm_eps)
