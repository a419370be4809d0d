"""Gaussian noise that depends on seed, stage and shape alone, not on device, batch or sharding."""

from collections.abc import Sequence

import numpy as np


def gaussian(seed: int, stage: int, shape: tuple[int, ...]) -> np.ndarray:
    """N(0, 1) of `shape`, float32, from a counter-based generator keyed by (seed, stage)."""
    key = np.random.SeedSequence(seed, spawn_key=(stage,))
    return np.random.Generator(np.random.Philox(key)).standard_normal(shape, dtype=np.float32)


def stage_noises(
    seeds: Sequence[int], leading: tuple[int, ...], grids: Sequence[tuple[int, int]]
) -> list[np.ndarray]:
    """Noise `[B, *leading, h, w]`, float32, for each stage's grid `(h, w)`, from one seed for each output.

    `leading` is (channels,) for pictures and (channels, frames) for videos. The first array is the initial
    latents. The others are coefficients for `spectral.expansion.expand`. Noise that all stages share is drawn
    for the last grid alone and divided by `spectral.expansion.share`.
    """
    return [
        np.stack([gaussian(seed, stage, (*leading, *grid)) for seed in seeds])
        for stage, grid in enumerate(grids)
    ]
