"""A toy family, made as CONTRIBUTING.md describes. It has the least that `jaxspd generate` needs of a family.

Its latents have 3 channels and half the resolution. Its text encoder counts letters.
"""

import json
import operator
import string
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce, repeat
from flax import nnx

from jaxspd import families
from jaxspd.convert.checkpoint import write_component
from jaxspd.convert.loader import flat_parameters
from jaxspd.convert.table import linear
from jaxspd.families.base import BaseFamily, check_parts, read_spectrum
from jaxspd.families.configs import read_scheduler, read_transformer_config
from jaxspd.models.layers import Linear, layer, sinusoidal_embedding
from jaxspd.sampling.schedule import flow_match_sigmas, override_shift
from jaxspd.spectral.spectrum import Spectrum

SPECTRUM = Spectrum(amplitude=20.0, exponent=3.0)
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}
LETTERS = string.ascii_lowercase


# models/toy.py


@dataclass(frozen=True)
class ToyConfig:
    """The fields of `transformer/config.json`."""

    in_channels: int = 3
    dim: int = 16
    num_layers: int = 2


class Block(nnx.Module):
    """One layer, modulated by text and time."""

    def __init__(self, config: ToyConfig, *, dtype):
        self.layer = Linear(config.dim, config.dim, dtype=dtype)

    def __call__(self, x: jax.Array, vector: jax.Array) -> jax.Array:
        return x + jax.nn.silu(self.layer(x + vector[:, None]))


class ToyTransformer(nnx.Module):
    """Velocity of latents `[B, C, h, w]`, pixel by pixel."""

    def __init__(self, config: ToyConfig, *, dtype=jnp.float32):
        self.dim = config.dim
        self.image_in = Linear(config.in_channels, config.dim, dtype=dtype)
        self.text_in = Linear(len(LETTERS), config.dim, dtype=dtype)
        self.blocks = nnx.List(Block(config, dtype=dtype) for _ in range(config.num_layers))
        self.out = Linear(config.dim, config.in_channels, dtype=dtype)

    def __call__(self, latents: jax.Array, text: jax.Array, time: jax.Array) -> jax.Array:
        x = self.image_in(rearrange(latents, "b c h w -> b (h w) c"))
        vector = self.text_in(text) + sinusoidal_embedding(time, self.dim)
        for block in self.blocks:
            x = layer(block, x, vector)
        return rearrange(self.out(x), "b (h w) c -> b c h w", h=latents.shape[2])


# convert/toy.py

RULES = (
    *linear("img_in", "image_in"),
    *linear("txt_in", "text_in"),
    *linear("layers.{}.proj", "blocks.{}.layer"),
    *linear("proj_out", "out"),
)


# families/toy.py


@dataclass(frozen=True)
class Squares:
    """An autoencoder that is also its configuration. A latent is a square of 2×2 pixels."""

    channels: int = 3
    pixels_per_latent: int = 2

    def prepare(self, shape: tuple[int, ...]) -> None:
        """Does nothing: there is nothing to compile."""

    def decode(self, latents: np.ndarray) -> np.ndarray:
        pixels = repeat(latents, "b c h w -> b 1 (h 2) (w 2) c")
        return np.clip(127.5 * (pixels + 1), 0, 255).astype(np.uint8)

    def encode(self, pixels: np.ndarray, pictures: bool) -> np.ndarray:
        pool = "b 1 (h 2) (w 2) c -> b c h w"
        return reduce(pixels.astype(np.float32), pool, "mean") / 127.5 - 1


@dataclass(frozen=True)
class Family(BaseFamily):
    """The toy, with classifier-free guidance."""

    name: ClassVar[str] = "toy"
    title: ClassVar[str] = "Toy"
    rules: ClassVar = RULES
    transformer: ClassVar = ToyTransformer
    parts: ClassVar = ("scheduler", "transformer")
    patch: ClassVar = (1, 1)
    # The toy has no text encoders, and its autoencoder has no weights.
    texts: ClassVar = ()
    weights: ClassVar = {}

    folder: Path | None = None
    config: ToyConfig = ToyConfig()
    scheduler: dict = field(default_factory=lambda: SCHEDULER)
    vae: Squares = Squares()
    spectrum: Spectrum = SPECTRUM
    text_tokens: int = 1

    @classmethod
    def from_folder(cls, folder: Path) -> "Family":
        check_parts(folder, cls.parts)
        config, scheduler = read_transformer_config(folder, ToyConfig), read_scheduler(folder)
        return cls(folder, config, scheduler, spectrum=read_spectrum(folder, SPECTRUM))

    default_steps: ClassVar[int] = 12
    default_guidance: ClassVar[float] = 2.0
    default_size: ClassVar[tuple[int, int]] = (32, 48)

    def sigmas(self, steps: int, tokens: int, flow_shift: float | None = None) -> np.ndarray:
        return flow_match_sigmas(override_shift(self.scheduler, flow_shift), steps, tokens)

    def live_channels(self, tokens: int) -> float:
        """As if a layer kept all its tokens four times."""
        return 4 * tokens * self.config.dim

    def forward_flops(self, tokens: int) -> float:
        return 2.0 * tokens * self.config.dim * (2 * self.config.in_channels + self.config.dim)

    def velocity(self, model, latents, sigma, conditioning):
        return model(latents, conditioning["text"], jnp.broadcast_to(1000 * sigma, latents.shape[:1]))

    def abstract_conditioning(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {"text": jax.ShapeDtypeStruct((batch, len(LETTERS)), jnp.float32)}

    def encode(self, prompts: Sequence[str], encoders: Sequence) -> dict[str, np.ndarray]:
        return {"text": np.array([[p.count(letter) for letter in LETTERS] for p in prompts], np.float32)}

    def open_autoencoder(self, dtype, residency) -> Squares:
        return self.vae


# families/__init__.py


def register(put: Callable = operator.setitem) -> None:
    """Makes this module a family's and adds the family to the registry."""
    put(sys.modules, "jaxspd.families.toy", sys.modules[__name__])
    put(families.PIPELINES, "ToyPipeline", "toy")


# tests/tiny/toy.py


def write_toy(folder: Path) -> Path:
    """Writes a random toy in the official layout."""
    (folder / "scheduler").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline"}))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    rng = np.random.default_rng(0)
    shapes = flat_parameters(nnx.state(ToyTransformer(ToyConfig())))
    values = {path: rng.normal(size=p.shape) / p.shape[-1] ** 0.5 for path, p in shapes.items()}
    config = {"in_channels": 3, "dim": 16, "num_layers": 2}
    write_component(folder / "transformer", "ToyTransformer", config, RULES, values, np.float32)
    return folder
