"""Autoencoders of pictures: AutoencoderKL (FLUX.1, Z-Image) and AutoencoderKLFlux2.

Sources: latent diffusion, arXiv 2112.10752; Black Forest Labs, FLUX.1 (2024) and FLUX.2 (2025).
`convert/vae_image.py` says which official key fills which parameter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspd.errors import UsageError
from jaxspd.models.attention import single_head_attention
from jaxspd.models.layers import Linear
from jaxspd.models.packing import patchify, unpatchify
from jaxspd.models.vae.config import read
from jaxspd.models.vae.layers import Conv, Downsample, GroupNorm, Upsample


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """The fields of `vae/config.json`, with the official class's names and defaults."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float | None = field(default=None, metadata={"example": 0.0})

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        return self.block_out_channels

    @property
    def scale(self) -> int:
        """Pixels along an edge of a latent."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class AutoencoderKLFlux2Config:
    """The fields of `vae/config.json`, with the official class's names and defaults."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = field(default=None, metadata={"example": (64,)})
    layers_per_block: int = 2
    latent_channels: int = 32
    norm_num_groups: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    batch_norm_eps: float = 1e-4

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        return self.decoder_block_out_channels or self.block_out_channels

    @property
    def scale(self) -> int:
        """Pixels along an edge of a latent."""
        return 2 ** (len(self.block_out_channels) - 1)


def read_image_config(given: Mapping[str, Any]) -> AutoencoderKLConfig | AutoencoderKLFlux2Config:
    """The configuration in the object of a `config.json`; UsageError for what is not understood."""
    flux2 = given.get("_class_name") == "AutoencoderKLFlux2"
    config_class = AutoencoderKLFlux2Config if flux2 else AutoencoderKLConfig
    levels = given.get("block_out_channels", config_class.block_out_channels)
    count = len(levels) if isinstance(levels, list | tuple) else 1
    fixed = {
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
    }
    fixed |= {"patch_size": [2, 2]} if flux2 else {"latents_mean": None, "latents_std": None}
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    config = read(config_class, given, fixed, ("sample_size", "force_upcast", "batch_norm_momentum"))
    if len(config.decoder_channels) != count:
        raise UsageError("vae/config.json: decoder_block_out_channels must be as many as block_out_channels")
    for channels in (*config.block_out_channels, *config.decoder_channels):
        if channels % config.norm_num_groups:
            raise UsageError(
                f"vae/config.json: {channels} channels cannot be normalised in {config.norm_num_groups} "
                "groups; norm_num_groups must divide every width"
            )
    return config


class Resnet(nnx.Module):
    """Two convolutions of what is normalised, beside a straight connection (arXiv 1512.03385)."""

    def __init__(self, dim_in: int, dim_out: int, groups: int, *, dtype, rngs):
        self.norm1 = GroupNorm(groups, dim_in, dtype=dtype)
        self.conv1 = Conv(dim_in, dim_out, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(groups, dim_out, dtype=dtype)
        self.conv2 = Conv(dim_out, dim_out, dtype=dtype, rngs=rngs)
        self.shortcut = None if dim_in == dim_out else Conv(dim_in, dim_out, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return hidden + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
    """Every pixel of a map attends to every other, with one head."""

    def __init__(self, dim: int, groups: int, *, dtype, rngs):
        self.norm = GroupNorm(groups, dim, dtype=dtype)
        self.q, self.k, self.v, self.out = (Linear(dim, dim, dtype=dtype, rngs=rngs) for _ in range(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        pixels = self.norm(x).reshape(len(x), -1, x.shape[-1])
        attended = single_head_attention(self.q(pixels), self.k(pixels), self.v(pixels))
        return x + self.out(attended).reshape(x.shape)


class Middle(nnx.Module):
    """Resnet, attention where there is one, resnet, on the coarsest maps."""

    def __init__(self, dim: int, groups: int, attends: bool, *, dtype, rngs):
        self.before = Resnet(dim, dim, groups, dtype=dtype, rngs=rngs)
        self.attention = Attention(dim, groups, dtype=dtype, rngs=rngs) if attends else None
        self.after = Resnet(dim, dim, groups, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.before(x)
        return self.after(x if self.attention is None else self.attention(x))


class Level(nnx.Module):
    """A row of resnets at one resolution, then the change to the next."""

    def __init__(self, dim_in: int, dim_out: int, length: int, groups: int, resample, *, dtype, rngs):
        self.resnets = nnx.List(
            Resnet(dim_out if number else dim_in, dim_out, groups, dtype=dtype, rngs=rngs)
            for number in range(length)
        )
        self.resample = resample

    def __call__(self, x: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.resample is None else self.resample(x)


class Encoder(nnx.Module):
    """Pixels `[N, H, W, in_channels]` to mean and log variance `[N, h, w, 2 latent_channels]`."""

    def __init__(self, config, *, dtype, rngs):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv(config.in_channels, widths[0], dtype=dtype, rngs=rngs)
        levels = []
        for before, width in zip((widths[0], *widths), widths, strict=False):
            last = len(levels) == len(widths) - 1
            down = None if last else Downsample(width, dtype=dtype, rngs=rngs)
            levels.append(Level(before, width, config.layers_per_block, groups, down, dtype=dtype, rngs=rngs))
        self.levels = nnx.List(levels)
        self.middle = Middle(widths[-1], groups, config.mid_block_add_attention, dtype=dtype, rngs=rngs)
        self.norm_out = GroupNorm(groups, widths[-1], dtype=dtype)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x))))


class Decoder(nnx.Module):
    """Latents `[N, h, w, latent_channels]` to pixels `[N, H, W, out_channels]`."""

    def __init__(self, config, *, dtype, rngs):
        widths, groups = config.decoder_channels[::-1], config.norm_num_groups
        self.conv_in = Conv(config.latent_channels, widths[0], dtype=dtype, rngs=rngs)
        self.middle = Middle(widths[0], groups, config.mid_block_add_attention, dtype=dtype, rngs=rngs)
        length, levels = config.layers_per_block + 1, []
        for before, width in zip((widths[0], *widths), widths, strict=False):
            last = len(levels) == len(widths) - 1
            up = None if last else Upsample(width, width, dtype=dtype, rngs=rngs)
            levels.append(Level(before, width, length, groups, up, dtype=dtype, rngs=rngs))
        self.levels = nnx.List(levels)
        self.norm_out = GroupNorm(groups, widths[-1], dtype=dtype)
        self.conv_out = Conv(widths[-1], config.out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.middle(self.conv_in(x))
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class ImageAutoencoder(nnx.Module):
    """Encoder and decoder of pictures; `dtype` is that of weights and convolutions, norms' statistics and
    softmax are in float32.
    """

    def __init__(self, config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)
        channels = config.latent_channels

        def pointwise(wanted: bool, dim: int) -> Conv | None:
            return Conv(dim, dim, 1, dtype=dtype, rngs=rngs) if wanted else None

        self.quant_conv = pointwise(config.use_quant_conv, 2 * channels)
        self.post_quant_conv = pointwise(config.use_post_quant_conv, channels)

    def encode(self, pixels: jax.Array) -> jax.Array:
        """The posterior's mode `[B, C, h, w]`, float32, not normalised, of pixels `[B, H, W, 3]` in [-1, 1]
        whose sizes are multiples of `config.scale`.
        """
        x = self.encoder(pixels.astype(self.dtype))
        x = x if self.quant_conv is None else self.quant_conv(x)
        return jnp.moveaxis(x[..., : self.config.latent_channels], -1, 1).astype(jnp.float32)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Pixels `[B, H, W, 3]`, float32, of latents `[B, C, h, w]` that are not normalised. They lie about
        [-1, 1]; the caller cuts off what lies beyond.
        """
        x = jnp.moveaxis(latents, 1, -1).astype(self.dtype)
        x = x if self.post_quant_conv is None else self.post_quant_conv(x)
        return self.decoder(x).astype(jnp.float32)


class AutoencoderKL(ImageAutoencoder):
    """FLUX.1's and Z-Image's. Latents for the transformer are shifted and scaled by two numbers."""

    def normalise(self, latents: jax.Array) -> jax.Array:
        """Raw latents as the transformer knows them."""
        return (latents - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def denormalise(self, latents: jax.Array) -> jax.Array:
        """The transformer's latents as the decoder knows them."""
        return latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)


class AutoencoderKLFlux2(ImageAutoencoder):
    """FLUX.2's. Latents for the transformer are patchified 2×2, `[B, 4C, h/2, w/2]`, and normalised channel
    by channel with running statistics of training, which are kept in float32.
    """

    def __init__(self, config: AutoencoderKLFlux2Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.mean = nnx.Param(jnp.zeros(4 * config.latent_channels, jnp.float32))
        self.variance = nnx.Param(jnp.ones(4 * config.latent_channels, jnp.float32))

    def normalise(self, latents: jax.Array) -> jax.Array:
        """Raw latents `[B, C, h, w]` as the transformer knows them, `[B, 4C, h/2, w/2]`."""
        mean, deviation = self._statistics()
        return (patchify(latents) - mean) / deviation

    def denormalise(self, latents: jax.Array) -> jax.Array:
        """The transformer's latents as the decoder knows them: `normalise`'s reverse."""
        mean, deviation = self._statistics()
        return unpatchify(latents * deviation + mean)

    def _statistics(self) -> tuple[jax.Array, jax.Array]:
        mean, variance = (values[...][:, None, None] for values in (self.mean, self.variance))
        return mean, jnp.sqrt(variance + self.config.batch_norm_eps)
