"""Gaussian noise that depends on seed and stage alone: not on device, batch or sharding."""

from collections.abc import Sequence

import numpy as np


def gaussian(seed: int, stage: int, shape: tuple[int, ...]) -> np.ndarray:
    """N(0, 1) of `shape`, float32, from a counter-based generator keyed by (seed, stage)."""
    key = np.random.SeedSequence(seed, spawn_key=(stage,))
    return np.random.Generator(np.random.Philox(key)).standard_normal(shape, dtype=np.float32)


def stage_noises(
    seeds: Sequence[int], leading: tuple[int, ...], grids: Sequence[tuple[int, int]]
) -> list[np.ndarray]:
    """A batch's noise `[B, *leading, h, w]` for each stage's grid, one output a seed; `leading` is
    (channels,) for pictures and (channels, frames) for videos.

    The first is the initial latents; the others are coefficients for `spectral.expansion.expand`. For noise
    that all stages share, draw it for the last grid alone and let `spectral.expansion.share` divide it.
    """
    return [
        np.stack([gaussian(seed, stage, (*leading, *grid)) for seed in seeds])
        for stage, grid in enumerate(grids)
    ]
