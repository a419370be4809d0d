"""The settings of the sampler that the quality study compares, by name."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxspd.spectral.expansion import Expansion

STEPS = 20
BASELINE, LONG = "fullres", "fullres, 50 steps"


@dataclass(frozen=True)
class Cell:
    """One setting. `settings` are parameters of a request. `expansion` replaces how the grid grows.

    `as_fast_as` names another cell: this one runs full resolution in fewer steps, at that cell's FLOPs.
    `baseline` names the cell that this one is compared to.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = STEPS
    expansion: Expansion | None = None
    as_fast_as: str | None = None
    baseline: str = BASELINE


def bilinear(latents: jax.Array, noise: jax.Array, sigma, kappa, transform: str) -> jax.Array:
    """The simplest way to grow a grid: the latents, with their noise, are interpolated."""
    return jax.image.resize(jnp.asarray(latents, jnp.float32), noise.shape, "bilinear")


def grown(mode: str, delta: float, **others) -> dict[str, Any]:
    settings = {"mode": mode, "delta": delta, "noise": "fresh", **others}
    return {f"progressive_{name}": value for name, value in settings.items()}


CELLS = [
    Cell(BASELINE),
    *[Cell(f"dct_rewind {d:g}", grown("dct_rewind", d)) for d in (0.05, 0.2, 0.01, 0.1, 0.5)],
    *[Cell(f"dct {d:g}", grown("dct", d)) for d in (0.05, 0.2)],
    *[
        Cell(f"{t} rewind {d:g}", grown("dct_rewind", d, transform=t))
        for t in ("fft", "dwt")
        for d in (0.05, 0.2)
    ],
    *[Cell(f"re-spaced {d:g}", grown("dct_rewind", d, respace=True)) for d in (0.05, 0.2, 0.01, 0.1)],
    Cell("stage shift 0.05", grown("dct_rewind", 0.05, shift="stage")),
    Cell("stage shift, re-spaced 0.05", grown("dct_rewind", 0.05, shift="stage", respace=True)),
    *[Cell(f"two levels {d:g}", grown("dct_rewind", d, levels=2)) for d in (0.05, 0.2)],
    Cell("two levels, re-spaced 0.05", grown("dct_rewind", 0.05, levels=2, respace=True)),
    Cell("scale 3/4 0.05", grown("dct_rewind", 0.05, scales=["3/4", "1"])),
    *[Cell(f"bilinear at {d:g}", grown("dct", d), expansion=Expansion(bilinear)) for d in (0.05, 0.2)],
    *[Cell(f"fewer steps, as {d:g}", as_fast_as=f"dct_rewind {d:g}") for d in (0.05, 0.2, 0.5)],
    *[Cell(f"shared noise {d:g}", grown("dct_rewind", d, noise="shared")) for d in (0.05, 0.2)],
    Cell(LONG, steps=50, baseline=LONG),
    Cell("dct_rewind 0.05, 50 steps", grown("dct_rewind", 0.05), 50, baseline=LONG),
    Cell("re-spaced 0.05, 50 steps", grown("dct_rewind", 0.05, respace=True), 50, baseline=LONG),
]

# Pairs of cells to compare, the first with the second, beside their differences to full resolution.
QUESTIONS = [
    *[(f"dct_rewind {d:g}", f"dct {d:g}") for d in (0.05, 0.2)],
    *[(f"{t} rewind {d:g}", f"dct_rewind {d:g}") for t in ("fft", "dwt") for d in (0.05, 0.2)],
    *[(f"re-spaced {d:g}", f"dct_rewind {d:g}") for d in (0.05, 0.2)],
    ("re-spaced 0.05, 50 steps", "dct_rewind 0.05, 50 steps"),
    ("stage shift 0.05", "dct_rewind 0.05"),
    ("stage shift, re-spaced 0.05", "re-spaced 0.05"),
    ("two levels, re-spaced 0.05", "re-spaced 0.05"),
    *[(f"dct_rewind {d:g}", f"bilinear at {d:g}") for d in (0.05, 0.2)],
    *[
        (f"{mode} {d:g}", f"fewer steps, as {d:g}")
        for mode in ("dct_rewind", "re-spaced")
        for d in (0.05, 0.2)
    ],
    *[(f"shared noise {d:g}", f"dct_rewind {d:g}") for d in (0.05, 0.2)],
]
