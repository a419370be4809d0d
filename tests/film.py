"""A toy family of videos, made from that in `tests/toy.py`. The transformer sees all frames as one tall
picture.
"""

import json
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from einops import rearrange

from jaxspd import families
from tests import toy

FRAMES = 4  # per latent; the first latent has one


@dataclass(frozen=True)
class Squares(toy.Squares):
    """The toy's autoencoder for videos. All frames of a latent are alike."""

    def decode(self, latents: np.ndarray) -> np.ndarray:
        batch = len(latents)
        pixels = rearrange(super().decode(rearrange(latents, "b c t h w -> (b t) c h w")), "n 1 ... -> n ...")
        frames = rearrange(pixels, "(b t) ... -> b t ...", b=batch).repeat(FRAMES, axis=1)
        return frames[:, FRAMES - 1 :]

    def encode(self, pixels: np.ndarray, pictures: bool) -> np.ndarray:
        return super().encode(pixels, pictures)[:, :, None]


@dataclass(frozen=True)
class Family(toy.Family):
    name: ClassVar[str] = "film"
    title: ClassVar[str] = "Film"
    default_frames: ClassVar[int] = 5
    default_fps: ClassVar[int] = 8
    frames_per_latent: ClassVar[int] = FRAMES

    vae: Squares = Squares()

    def leading(self, frames: int) -> tuple[int, ...]:
        return self.vae.channels, (frames - 1) // FRAMES + 1

    def velocity(self, model, latents, sigma, conditioning):
        tall = super().velocity(model, rearrange(latents, "b c t h w -> b c (t h) w"), sigma, conditioning)
        return rearrange(tall, "b c (t h) w -> b c t h w", t=latents.shape[2])


def write_film(folder: Path, put: Callable = operator.setitem) -> Path:
    """Writes a random model of a family that `put` registers."""
    put(sys.modules, "jaxspd.families.film", sys.modules[__name__])
    put(families.PIPELINES, "FilmPipeline", "film")
    toy.write_toy(folder)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FilmPipeline"}))
    return folder
