"""Spectral progressive diffusion (arXiv 2605.18736): when the grid grows, and how.

Frequencies are in cycles per image; a spectrum is the pair ``(A, beta)`` of ``P(w) = A |w|^-beta``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from torch_ref.bases import BASES

Mode = Literal["fullres", "dct", "dct_rewind"]
Transform = Literal["dct", "fft", "dwt"]
Spectrum = tuple[float, float]

FLUX1_SPECTRUM: Spectrum = (203.615097, 1.915461)
WAN_SPECTRUM: Spectrum = (219.484718, 2.422687)


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How a generation grows its grid: the keywords of every family's ``denoise``.

    The mode ``fullres`` has one stage, on the full grid. ``levels`` is the number of halvings; ``scales``,
    which end in 1, replace them. The grid grows at the first sigma not above a threshold. Thresholds follow
    from ``delta`` and ``spectrum`` unless ``thresholds`` are given. The mode ``dct_rewind`` aligns the noise
    level after each expansion, in any ``transform``. With ``respace`` the remaining sigmas then lie evenly
    along the rest of the schedule. ``shift`` chooses the full grid's schedule or each stage's own.

    With ``shared`` noise one array is given, and all stages see parts of it. Otherwise an array is given for
    each stage. With a ``forecast`` most steps do not call the model: see :mod:`torch_ref.forecast`.
    ``scheduler`` steps from one sigma to the next. If that is UniPC, ``history`` says whether it carries its
    history to the new grid or forgets it.
    """

    mode: Mode = "fullres"
    levels: int = 1
    scales: tuple[float, ...] | None = None
    delta: float = 0.01
    spectrum: Spectrum = FLUX1_SPECTRUM
    thresholds: tuple[float, ...] | None = None
    transform: Transform = "dct"
    respace: bool = False
    shift: Literal["full", "stage"] = "full"
    noise: Literal["shared", "fresh"] = "fresh"
    forecast: float | None = None
    scheduler: Literal["euler", "unipc"] = "euler"
    history: Literal["forget", "carry"] = "forget"

    def __post_init__(self) -> None:
        if self.mode not in ("fullres", "dct", "dct_rewind"):
            raise ValueError(f"unknown mode {self.mode!r}")

    @property
    def ladder(self) -> tuple[float, ...]:
        """The scale of every stage."""
        if self.mode == "fullres":
            return (1.0,)
        return self.scales or tuple(2.0**-k for k in range(self.levels, -1, -1))

    def grids(self, height: int, width: int, patch: int = 1) -> list[tuple[int, int]]:
        """Latent grids ``(h, w)`` of the stages, coarsest first, in whole tokens of ``patch`` latents."""
        if self.scales is None:
            return stage_grids(height, width, len(self.ladder) - 1)
        return [tuple(max(1, round(c * n / patch)) * patch for n in (height, width)) for c in self.ladder]

    def schedule_grids(self, noises: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
        """For each stage, the latent grid whose schedule it follows."""
        return [
            tuple(noise.shape[-2:])
            for noise in (noises if self.shift == "stage" else noises[-1:] * len(noises))
        ]

    def limits(self, height: int, width: int) -> list[float]:
        """For each stage but the last, the sigma at which it has to end."""
        if self.thresholds is not None:
            return list(self.thresholds)[: len(self.ladder) - 1]
        # The Nyquist frequency of each coarse grid. For halvings it is in whole cycles, as published.
        if self.scales is None:
            frequencies = [min(grid) // 2 for grid in self.grids(height, width)]
        else:
            frequencies = [c * min(height, width) / 2 for c in self.ladder]
        return [activation_sigma(omega, self.delta, self.spectrum) for omega in frequencies[:-1]]


@dataclass(frozen=True)
class Segment:
    """A stage's steps.

    ``start`` is the first step's index, and ``before`` the sigma at which the stage before ended. ``sigmas``
    run from the first step's to the one after the last step. ``factor`` is the factor that aligned the first.
    """

    start: int
    before: float
    factor: float
    sigmas: list[float]


def segments(growth: Growth, schedules: Sequence[Sequence[float]], height: int, width: int) -> list[Segment]:
    """The stages' steps on the full grid ``height`` by ``width``.

    ``schedules`` has, for each stage, the sigmas at which a generation on one grid would call the model.
    Raises ``ValueError`` if a stage would have no step, or if its noise would rise.
    """
    grids, limits, ladder = growth.grids(height, width), growth.limits(height, width), growth.ladder
    count, start, before = len(schedules[-1]), 0, schedules[0][0]
    found = []
    for stage, schedule in enumerate(schedules):
        factor = 1.0
        if stage and growth.mode == "dct_rewind":
            factor = kappa(before, ladder[stage] / ladder[stage - 1])
        rest = [*schedule[start + 1 :], 0.0]
        if stage and growth.respace and start < count:
            rest = spread(schedule, start, factor * before)
        end = count
        if stage < len(limits):
            seen = [before, *rest[:-1]]
            end = start + next((i for i, s in enumerate(seen) if s <= limits[stage]), len(seen))
        if end <= start or start >= count:
            h, w = grids[stage]
            raise ValueError(f"stage {stage + 1} at {h}x{w} has no step; try more steps")
        sigmas = [factor * before, *rest][: end - start + 1]
        if sigmas[0] <= sigmas[1]:
            raise ValueError(f"stage {stage + 1} would go from sigma {sigmas[0]} up to {sigmas[1]}")
        found.append(Segment(start, before, factor, sigmas))
        start, before = end, sigmas[-1]
    return found


def spread(schedule: Sequence[float], start: int, sigma: float) -> list[float]:
    """As many sigmas below ``sigma`` as ``schedule`` has after ``start``, the final 0 included.

    They are evenly spaced in the schedule's index, which is interpolated between two entries.
    """
    levels = [*schedule, 0.0]
    # The interval of the schedule that holds sigma, and the place of sigma in it.
    piece = max(i for i in range(len(schedule)) if levels[i] >= sigma)
    place = piece + (levels[piece] - sigma) / (levels[piece] - levels[piece + 1])
    left = len(schedule) - start
    result = []
    for step in range(1, left):
        at = place + (len(schedule) - place) * step / left
        low = int(at)
        result.append(levels[low] + (at - low) * (levels[low + 1] - levels[low]))
    return [*result, 0.0]


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


def same(x: torch.Tensor) -> torch.Tensor:
    """``x``."""
    return x


def stage_noises(
    noises: Sequence[np.ndarray | torch.Tensor],
    growth: Growth,
    device: torch.device | str,
    patch: int = 2,
    grown: Callable[[torch.Tensor], torch.Tensor] = same,
    back: Callable[[torch.Tensor], torch.Tensor] = same,
) -> list[torch.Tensor]:
    """One float32 array ``[..., h, w]`` on ``device`` for each stage, from ``noises``.

    The last array of ``noises`` has the full grid. A token is ``patch`` by ``patch`` latents. Shared noise is
    that array alone, and the stages' arrays are parts of it. ``grown`` turns latents into those whose grid
    grows, and ``back`` is its inverse. Raises ``ValueError`` unless ``noises`` fit ``growth``.
    """
    noises = [torch.as_tensor(noise, dtype=torch.float32, device=device) for noise in noises]
    *leading, height, width = noises[-1].shape
    grids = growth.grids(height, width, patch)
    if growth.noise == "shared":
        if len(noises) != 1:
            raise ValueError(f"shared noise is one array, not {len(noises)}")
        whole = grown(noises[0])
        scale = whole.shape[-1] // width
        parts = share(whole, [(scale * h, scale * w) for h, w in grids], growth.transform)
        noises = [back(part) for part in parts]
    if [tuple(noise.shape) for noise in noises] != [(*leading, *grid) for grid in grids]:
        raise ValueError(f"one noise array is needed for each of the grids {grids}, otherwise alike")
    # Otherwise a grid would not be exactly half of the next one, or a token would be cut in two.
    multiple = patch << (len(grids) - 1 if growth.scales is None else 0)
    if height % multiple or width % multiple:
        raise ValueError(f"the last grid must be even at every halving, in multiples of {multiple}: {grids}")
    return noises


def share(
    noise: torch.Tensor, grids: Sequence[tuple[int, int]], transform: Transform = "dct"
) -> list[torch.Tensor]:
    """Divides ``noise`` ``[..., H, W]`` on the last of ``grids`` among the stages: an array for each grid.

    The first is a field, and the others are coefficients as :func:`expand` takes them. For the DCT and the
    Fourier basis, each grid has the low corner of the full grid's coefficients. For wavelets, the scaled sums
    of four neighbours are the noise of the next coarser grid.
    """
    basis = BASES[transform]
    field, parts = noise.double(), []
    for height, width in grids[-2::-1]:
        rows, columns = (basis(size, noise.device) for size in field.shape[-2:])
        coefficients = rows @ field @ columns.T
        parts.append(coefficients.to(noise.dtype))
        field = coefficients[..., :height, :width]
        if transform != "dwt":
            field = basis(height, noise.device).T @ field @ basis(width, noise.device)
    return [field.to(noise.dtype), *reversed(parts)]


def stage_starts(
    sigmas: Sequence[float],
    height: int,
    width: int,
    *,
    levels: int,
    delta: float,
    spectrum: Spectrum = FLUX1_SPECTRUM,
) -> list[int]:
    """The index of the first step of each of the ``levels + 1`` stages.

    ``sigmas`` are the noise levels at which the model is called, without the final 0. A stage starts at the
    first ``sigma <= t(w)``, where ``w = min(h, w) // 2`` is the Nyquist frequency of the grid before it.
    Raises ``ValueError`` if a stage would have no step.
    """
    growth = Growth(mode="dct", levels=levels, delta=delta, spectrum=spectrum)
    return [segment.start for segment in segments(growth, [sigmas] * (levels + 1), height, width)]


def expand(x: torch.Tensor, noise: torch.Tensor, sigma: float, transform: Transform = "dct") -> torch.Tensor:
    """Spectral noise expansion of ``x`` ``[..., h, w]`` at noise level ``sigma``.

    ``noise`` ``[..., h', w']`` is N(0, 1) in the *coefficient* domain of the finer grid. Its low-frequency
    corner is not used: the coefficients of ``x`` take its place. Returns ``[..., h', w']``. Wavelets double
    the grid, and ``x`` itself is the corner.
    """
    basis = BASES[transform]
    height, width = x.shape[-2:]
    known = x.double()
    if transform != "dwt":
        known = basis(height, x.device) @ known @ basis(width, x.device).T
    elif tuple(noise.shape[-2:]) != (2 * height, 2 * width):
        raise ValueError(f"wavelets double a grid, not {height}x{width} to {tuple(noise.shape[-2:])}")
    coefficients = sigma * noise.double()
    coefficients[..., :height, :width] = known
    rows, columns = (basis(size, x.device) for size in noise.shape[-2:])
    return (rows.T @ coefficients @ columns).to(x.dtype)


def kappa(sigma: float, ratio: float = 2.0) -> float:
    """The factor that brings an expanded latent back onto the noise schedule's line.

    Expansion by ``ratio`` r divides the signal's amplitude by r and keeps the noise's. The weights of signal
    and noise add up to 1 again after multiplying by ``r / (1 + (r - 1) sigma)``. The latent is then at noise
    level ``kappa * sigma``.
    """
    return ratio / (1 + (ratio - 1) * sigma)
