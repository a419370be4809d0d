"""Autoencoders between pixels and latents."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxspd.errors import UsageError
from jaxspd.models.vae.coder import Coder
from jaxspd.models.vae.image import AutoencoderKL, AutoencoderKLFlux2, read_image_config
from jaxspd.models.vae.video import VideoAutoencoder, read_video_config

# By the official classes' names: the module, and how its configuration is read.
AUTOENCODERS = {
    "AutoencoderKL": (AutoencoderKL, read_image_config),
    "AutoencoderKLFlux2": (AutoencoderKLFlux2, read_image_config),
    "AutoencoderKLQwenImage": (VideoAutoencoder, read_video_config),
    "AutoencoderKLWan": (VideoAutoencoder, read_video_config),
}
__all__ = ["AUTOENCODERS", "Coder", "abstract_autoencoder"]


def abstract_autoencoder(given: Mapping[str, Any], dtype=jnp.float32) -> nnx.Module:
    """The autoencoder that a `vae/config.json` describes, with shapes and dtypes in place of arrays;
    UsageError for one that is not understood.
    """
    name = given.get("_class_name")
    if name not in AUTOENCODERS:
        known = ", ".join(AUTOENCODERS)
        raise UsageError(f"vae/config.json: the class {name!r} is not known; use a checkpoint with {known}")
    module, read = AUTOENCODERS[name]
    config = read(given)
    return nnx.eval_shape(lambda: module(config, dtype=dtype, rngs=nnx.Rngs(0)))
