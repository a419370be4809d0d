"""Spectral progressive diffusion (arXiv 2605.18736): when the grid grows, and how.

Frequencies are in cycles per image; a spectrum is the pair ``(A, beta)`` of ``P(w) = A |w|^-beta``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

Mode = Literal["fullres", "dct", "dct_rewind"]
Spectrum = tuple[float, float]

FLUX1_SPECTRUM: Spectrum = (203.615097, 1.915461)
WAN_SPECTRUM: Spectrum = (219.484718, 2.422687)
# Every stage halves its successor's grid, so the ratio of two scales is always this.
HALVING = 2.0


def power(omega: float, spectrum: Spectrum) -> float:
    """Radial power ``P(w) = A |w|^-beta`` of the clean latents."""
    amplitude, beta = spectrum
    return amplitude * abs(omega) ** -beta


def activation_sigma(omega: float, delta: float, spectrum: Spectrum) -> float:
    """Noise level below which frequency ``omega`` is needed: the delta-optimal activation time.

    ``t(w) = 1 / (1 + sqrt(delta / (P (1 + P - delta))))``, with ``0 < delta < 1``.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie between 0 and 1, not {delta}")
    signal = power(omega, spectrum)
    return 1 / (1 + math.sqrt(delta / (signal * (1 + signal - delta))))


def stage_grids(height: int, width: int, levels: int) -> list[tuple[int, int]]:
    """Latent grids ``(h, w)`` of the ``levels + 1`` stages, coarsest first."""
    return [(height // 2**k, width // 2**k) for k in range(levels, -1, -1)]


def stage_noises(
    noises: Sequence[np.ndarray | torch.Tensor],
    mode: Mode,
    levels: int,
    device: torch.device | str,
    patch: int = 2,
) -> list[torch.Tensor]:
    """``noises``, one ``[..., h, w]`` a stage, as float32 on ``device``; ValueError unless they fit.

    The last one gives the full grid. ``fullres`` has one stage, whatever ``levels`` says. A token is
    ``patch`` by ``patch`` latents.
    """
    if mode not in ("fullres", "dct", "dct_rewind"):
        raise ValueError(f"unknown mode {mode!r}")
    noises = [torch.as_tensor(noise, dtype=torch.float32, device=device) for noise in noises]
    *leading, height, width = noises[-1].shape
    grids = stage_grids(height, width, 0 if mode == "fullres" else levels)
    if [tuple(noise.shape) for noise in noises] != [(*leading, *grid) for grid in grids]:
        raise ValueError(f"one noise array is needed for each of the grids {grids}, otherwise alike")
    # Else a stage would not be exactly twice as fine as the one before it, or cut a token in two.
    multiple = patch << (len(grids) - 1)
    if height % multiple or width % multiple:
        raise ValueError(f"the last grid must be even at every halving, in multiples of {multiple}: {grids}")
    return noises


def stage_starts(
    sigmas: Sequence[float],
    height: int,
    width: int,
    *,
    levels: int,
    delta: float,
    spectrum: Spectrum = FLUX1_SPECTRUM,
) -> list[int]:
    """Index of the first step of every stage, of which there are ``levels + 1``.

    ``sigmas`` are the noise levels at which the model is called, without the final 0. A stage
    starts at the first ``sigma <= t(w)``, where ``w = min(h, w) // 2`` is the Nyquist frequency
    of the grid before it. A stage left without a step is a ``ValueError``.
    """
    starts, grids = [0], stage_grids(height, width, levels)
    for h, w in grids[:-1]:
        threshold = activation_sigma(min(h, w) // 2, delta, spectrum)
        start = next((i for i, sigma in enumerate(sigmas) if sigma <= threshold), len(sigmas))
        starts.append(start)
    for stage, (start, end) in enumerate(itertools.pairwise([*starts, len(sigmas)])):
        if end <= start:
            h, w = grids[stage]
            raise ValueError(f"stage {stage + 1} at {h}x{w} has no step; try more steps")
    return starts


def dct_matrix(size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Orthonormal DCT-II as a float64 matrix ``[size, size]``, one frequency a row."""
    frequency = torch.arange(size, dtype=torch.float64, device=device)[:, None]
    position = torch.arange(size, dtype=torch.float64, device=device)[None, :]
    matrix = torch.cos(math.pi / size * frequency * (position + 0.5)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def dct2(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal 2-D DCT-II over the last two axes of ``x`` ``[..., h, w]``.

    The products run in float64, so a judge's rounding is never what a comparison measures (and
    no TF32 on CUDA); the result has the type of ``x``.
    """
    rows, columns = (dct_matrix(size, x.device) for size in x.shape[-2:])
    return (rows @ x.double() @ columns.T).to(x.dtype)


def idct2(coefficients: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`dct2`, ``[..., h, w]`` to ``[..., h, w]``."""
    rows, columns = (dct_matrix(size, coefficients.device) for size in coefficients.shape[-2:])
    return (rows.T @ coefficients.double() @ columns).to(coefficients.dtype)


def expand(x: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
    """Spectral noise expansion of ``x`` ``[..., h, w]`` at noise level ``sigma``.

    ``noise`` ``[..., h', w']`` is N(0, 1) in the *coefficient* domain of the finer grid. Its
    low-frequency corner is unused: the coefficients of ``x`` stand there. Returns
    ``[..., h', w']``.
    """
    height, width = x.shape[-2:]
    coefficients = sigma * noise
    coefficients[..., :height, :width] = dct2(x)
    return idct2(coefficients)


def kappa(sigma: float, ratio: float = HALVING) -> float:
    """Factor that brings an expanded latent back onto the noise schedule's line.

    Expansion by ``ratio`` divides the signal's amplitude by ``ratio`` and keeps the noise's, so
    signal and noise add up to ``1`` again only after multiplying by
    ``r / (1 + (r - 1) sigma)``; the latent is then at noise level ``kappa * sigma``.
    """
    return ratio / (1 + (ratio - 1) * sigma)


def grow(x: torch.Tensor, noise: torch.Tensor, sigma: float, mode: Mode) -> tuple[torch.Tensor, float]:
    """``x`` ``[..., h, w]`` on the grid of ``noise`` ``[..., h', w']``, and its noise level there.

    ``dct`` expands, which leaves the level at ``sigma``; ``dct_rewind`` also aligns the two (step
    4 of the method), which raises it.
    """
    x = expand(x, noise, sigma)
    if mode == "dct":
        return x, sigma
    factor = kappa(sigma)
    return factor * x, factor * sigma


def denoise_euler(
    scheduler: FlowMatchEulerDiscreteScheduler,
    velocity: Callable[[torch.Tensor, float], torch.Tensor],
    noises: Sequence[torch.Tensor],
    *,
    mode: Mode,
    delta: float,
    spectrum: Spectrum,
    grow: Callable[..., tuple[torch.Tensor, float]] = grow,
) -> torch.Tensor:
    """Latents ``[..., h, w]`` after all stages, by the steps of ``scheduler``, whose time steps are set.

    ``noises`` are those of :func:`stage_noises`; ``velocity`` is the model at latents and a sigma.
    The scheduler's sigmas are edited: it must be the caller's own.
    """
    height, width = noises[-1].shape[-2:]
    sigmas = scheduler.sigmas[:-1].tolist()
    starts = stage_starts(sigmas, height, width, levels=len(noises) - 1, delta=delta, spectrum=spectrum)
    latents = noises[0]
    for i, sigma in enumerate(sigmas):
        if i in starts[1:]:
            latents, sigma = grow(latents, noises[starts.index(i)], sigma, mode)
            # Only this entry: the step from it still ends on the schedule.
            scheduler.sigmas[i] = sigma
        latents = scheduler.step(velocity(latents, sigma), scheduler.timesteps[i], latents).prev_sample
    return latents
