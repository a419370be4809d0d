"""Configurations of AutoencoderKL and AutoencoderKLFlux2."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jaxspd.configs import check_options, checked_fields, wrong
from jaxspd.errors import UsageError

LARGEST_SIDE = 8192  # largest `sample_size` that is accepted, in pixels


class ImageAutoencoder:
    """Properties that the configurations of pictures' autoencoders share."""

    block_out_channels: tuple[int, ...]
    # Videos' autoencoders have this property too; a picture is one frame.
    frames_per_latent: ClassVar[int] = 1

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        return self.block_out_channels

    @property
    def scale(self) -> int:
        """Pixels along an edge of a raw latent."""
        return 2 ** (len(self.block_out_channels) - 1)

    def live_channels(self, frames: int) -> float:
        """The memory of decoding, weights excluded, in numbers of the VAE's dtype per pixel. Measured on
        programs that compilers for GPUs made (`bench/devices.py`).
        """
        return 5.05 * self.decoder_channels[0]


@dataclass(frozen=True)
class AutoencoderKLConfig(ImageAutoencoder):
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
    shift_factor: float | None = None
    # The side of the published models' pictures. The official class's default belongs to none of them.
    sample_size: int = 1024

    @property
    def channels(self) -> int:
        """Channels of the transformer's latents."""
        return self.latent_channels

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along an edge of one of the transformer's latents."""
        return self.scale


@dataclass(frozen=True)
class AutoencoderKLFlux2Config(ImageAutoencoder):
    """The fields of FLUX.2's `vae/config.json`, with the official class's names and defaults."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None
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
    def channels(self) -> int:
        """Channels of the transformer's latents, which are patchified."""
        return 4 * self.latent_channels

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along an edge of one of the transformer's latents."""
        return 2 * self.scale


ImageConfig = AutoencoderKLConfig | AutoencoderKLFlux2Config


def read_image_config(path: Path, given: Mapping[str, Any]) -> ImageConfig:
    """The configuration in `given`, the contents of the file `path`. Raises UsageError for what is not
    understood.
    """
    flux2 = given.get("_class_name") == "AutoencoderKLFlux2"
    config_class = AutoencoderKLFlux2Config if flux2 else AutoencoderKLConfig
    config = config_class(**checked_fields(path, given, config_class))
    count = len(config.block_out_channels)
    fixed: dict[str, Any] = {
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
    }
    fixed |= {"patch_size": [2, 2]} if flux2 else {"latents_mean": None, "latents_std": None}
    check_options(path, given, config_class, fixed, ("sample_size", "force_upcast", "batch_norm_momentum"))
    positive = "batch_norm_eps" if flux2 else "scaling_factor"
    if getattr(config, positive) <= 0:
        raise wrong(path, positive, getattr(config, positive), "a number above 0")
    if isinstance(config, AutoencoderKLConfig) and config.sample_size > LARGEST_SIDE:
        raise wrong(path, "sample_size", config.sample_size, f"at most {LARGEST_SIDE}")
    if config.layers_per_block < 1:
        raise wrong(path, "layers_per_block", config.layers_per_block, "1 or more")
    if len(config.decoder_channels) != count:
        raise UsageError(f"{path}: decoder_block_out_channels must be as many as block_out_channels")
    for channels in (*config.block_out_channels, *config.decoder_channels):
        if channels % config.norm_num_groups:
            raise UsageError(
                f"{path}: {channels} channels cannot be normalised in {config.norm_num_groups} "
                "groups; norm_num_groups must divide every width"
            )
    return config
