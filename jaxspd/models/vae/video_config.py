"""Configurations of AutoencoderKLWan and AutoencoderKLQwenImage, which have the same architecture."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxspd.configs import check_options, checked_fields, wrong
from jaxspd.errors import UsageError

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
    def channels(self) -> int:
        """Channels of latents."""
        return self.z_dim

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along an edge of a latent."""
        return self.scale

    def live_channels(self, frames: int) -> float:
        """The memory of decoding `frames` frames, weights excluded, in numbers of the VAE's dtype per pixel
        of all frames. Measured on programs that compilers for GPUs made (`bench/devices.py`). Most of a
        video's is the state that chunks carry on.
        """
        return (3.2 if frames == 1 else 10.3) * (self.decoder_base_dim or self.base_dim)

    @property
    def frames_per_latent(self) -> int:
        """Frames of each latent frame except the first."""
        return 2 ** sum(self.temperal_downsample)


def read_video_config(path: Path, given: Mapping[str, Any]) -> VideoAutoencoderConfig:
    """The configuration in `given`, the contents of the file `path`. Raises UsageError for what is not
    understood.
    """
    if given.get("is_residual"):
        raise UsageError(f"{path}: this VAE is Wan 2.2 5B's, which jaxspd cannot run; use Wan 2.1's")
    given = dict(given)
    if "input_channels" in given:  # AutoencoderKLQwenImage has one field for both
        given["in_channels"] = given["out_channels"] = given.pop("input_channels")
    config = VideoAutoencoderConfig(**checked_fields(path, given, VideoAutoencoderConfig))
    fixed: dict[str, Any] = {"patch_size": None, "attn_scales": []}
    # Sizes that the file gives must be those that the layers have.
    fixed |= {
        name: size
        for name, size in (
            ("scale_factor_spatial", config.scale),
            ("scale_factor_temporal", config.frames_per_latent),
        )
        if given.get(name) is not None
    }
    unread = ("dropout", "is_residual", "scale_factor_spatial", "scale_factor_temporal")
    check_options(path, given, VideoAutoencoderConfig, fixed, unread)
    levels, channels = len(config.dim_mult), config.z_dim
    if len(config.temperal_downsample) != levels - 1:
        raise UsageError(
            f"{path}: temperal_downsample must have {levels - 1} entries, one fewer than dim_mult"
        )
    for name in ("latents_mean", "latents_std"):
        if len(getattr(config, name)) != channels:
            raise wrong(path, name, given.get(name), f"a list of z_dim, {channels}, numbers")
    if min(config.latents_std) <= 0:
        raise wrong(path, "latents_std", given["latents_std"], "a list of numbers above 0")
    return config
