"""Helpers for tests of both kinds of autoencoders: diffusers' modules, and ours with the same weights."""

import json
from hashlib import md5
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from jaxspd.convert import vae_image, vae_video
from jaxspd.convert.checkpoint import Checkpoint
from jaxspd.convert.loader import load_parameters
from jaxspd.models.vae import READERS, Coder, abstract_autoencoder

# for float32, relative to the largest value
TOLERANCE = 1e-4


def rules_of(config) -> tuple:
    """The conversion table for a configuration of either kind."""
    if hasattr(config, "dim_mult"):
        return vae_video.rules(len(config.dim_mult), config.num_res_blocks)
    return vae_image.rules(len(config.block_out_channels), config.layers_per_block)


def read(config: dict):
    """Our configuration from the official one in `config`."""
    return READERS[config["_class_name"]](Path("vae/config.json"), config)


def coder_of(vae: torch.nn.Module, folder: Path, dtype=jnp.float32, **options) -> Coder:
    """Our `Coder` with the weights of diffusers' `vae`, which go through a checkpoint in `folder`."""
    vae.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    abstract = abstract_autoencoder(read(config), dtype)
    kind = Checkpoint if hasattr(abstract.config, "dim_mult") else vae_image.ImageAutoencoderCheckpoint
    parameters = load_parameters(kind(folder), nnx.state(abstract), rules_of(abstract.config))
    return Coder(abstract, parameters, **options)


@torch.no_grad()
def official_decode(vae: torch.nn.Module, latents: np.ndarray) -> np.ndarray:
    """Diffusers' pixels `[B, (T,) H, W, 3]` in [-1, 1]."""
    return vae.decode(torch.from_numpy(latents)).sample.clamp(-1, 1).movedim(1, -1).numpy()


@torch.no_grad()
def official_encode(vae: torch.nn.Module, pixels: np.ndarray) -> np.ndarray:
    """Diffusers' latents: the posterior's mode."""
    return vae.encode(torch.from_numpy(pixels).movedim(-1, 1)).latent_dist.mode().numpy()


def assert_near(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The peak signal-to-noise ratio in dB of pixels in [-1, 1]."""
    return float(10 * np.log10(4 / np.mean(np.square(ours - theirs))))


def key_list_md5(shapes: dict[str, tuple[int, ...]]) -> str:
    """A hash that identifies a checkpoint's keys and shapes."""
    named = [f"{key}:{'_'.join(map(str, shape))}" for key, shape in shapes.items()]
    return md5(",".join(sorted([*shapes, *named])).encode()).hexdigest()
