"""Autoencoders between pixels and latents."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxspd.convert.checkpoint import read_config
from jaxspd.errors import UsageError
from jaxspd.models.vae.coder import Coder
from jaxspd.models.vae.image import AutoencoderKL, AutoencoderKLFlux2
from jaxspd.models.vae.image_config import AutoencoderKLConfig, AutoencoderKLFlux2Config, read_image_config
from jaxspd.models.vae.video import VideoAutoencoder
from jaxspd.models.vae.video_config import VideoAutoencoderConfig, read_video_config

__all__ = [
    "AutoencoderKLConfig",
    "AutoencoderKLFlux2Config",
    "Coder",
    "VaeConfig",
    "VideoAutoencoderConfig",
    "abstract_autoencoder",
    "read_autoencoder",
]
VaeConfig = AutoencoderKLConfig | AutoencoderKLFlux2Config | VideoAutoencoderConfig
MODULES = {
    AutoencoderKLConfig: AutoencoderKL,
    AutoencoderKLFlux2Config: AutoencoderKLFlux2,
    VideoAutoencoderConfig: VideoAutoencoder,
}
# The reader of the configuration for each official class.
READERS = {
    "AutoencoderKL": read_image_config,
    "AutoencoderKLFlux2": read_image_config,
    "AutoencoderKLQwenImage": read_video_config,
    "AutoencoderKLWan": read_video_config,
}


def read_autoencoder(folder: Path, kind: str) -> Any:
    """The configuration in a VAE's `folder`. `kind` is the official class, a key of `READERS`. Raises
    UsageError if the folder holds another class or the configuration is not understood.
    """
    path, given = folder / "config.json", read_config(folder)
    name = given.get("_class_name", kind)
    if name != kind:
        raise UsageError(f"{path} is of {name!r}, not of {kind}; they do not belong together")
    return READERS[kind](path, {**given, "_class_name": kind})


def abstract_autoencoder(config: VaeConfig, dtype=jnp.float32) -> nnx.Module:
    """The autoencoder of a configuration, without weights."""
    module: Any = MODULES[type(config)]
    return module(config, dtype=dtype)
