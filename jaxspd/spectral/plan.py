"""What a request will run: its stages, decided on the host before anything is compiled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxspd.errors import UsageError
from jaxspd.spectral.levels import Level
from jaxspd.spectral.spectrum import Spectrum
from jaxspd.spectral.transforms import check_transform

MODES = ("fullres", "dct", "dct_rewind")
NOISES = ("shared", "fresh")
HISTORIES = ("forget", "carry")


@dataclass(frozen=True)
class Stage:
    """Consecutive denoising steps on one grid.

    `latent` is the grid `(h, w)`, and `tokens` the number of its image tokens. `start` and `end` are step
    numbers of the whole schedule, `end` exclusive. `sigmas` holds the `end - start + 1` noise levels that
    the steps run between; its first entry is `aligned_sigma`. `sigma` is the level at which the stage before
    ended, and `kappa` the factor that aligned it (1 where nothing was aligned).

    `skipped` and `second` hold step numbers of the whole schedule. Steps in `skipped` do not evaluate the
    model. Steps in `second` belong to the second of two models.
    """

    latent: tuple[int, int]
    tokens: int
    start: int
    end: int
    sigma: float
    kappa: float
    sigmas: tuple[float, ...]
    skipped: frozenset[int] = frozenset()
    second: frozenset[int] = frozenset()

    @property
    def aligned_sigma(self) -> float:
        return self.sigmas[0]

    @property
    def steps(self) -> int:
        return self.end - self.start

    @property
    def ratio(self) -> float:
        """The factor on the clean picture's coefficients when the grid grew to this stage's.

        It is the ratio of scales, which keeps the picture's amplitude, where the noise level was aligned.
        Elsewhere it is 1.
        """
        return self.kappa * (1 - self.sigma) / (1 - self.kappa * self.sigma) if self.start else 1.0

    @property
    def evaluated(self) -> list[int]:
        """The steps that evaluate the model."""
        return [step for step in range(self.start, self.end) if step not in self.skipped]


@dataclass(frozen=True)
class Plan:
    """The stages of one generation, coarsest first, and how the grid grows between them.

    `mode` is one of `MODES`, and `transform` names the basis in which the grid grows. `delta` is None where
    the σ of the transitions were given instead. `noise` is "shared" if all stages see parts of one field,
    "fresh" if each stage draws its own. `history` says what happens to a multistep solver's memory when the
    grid grows: "forget" or "carry".
    """

    mode: str
    transform: str
    delta: float | None
    stages: tuple[Stage, ...]
    noise: str = "shared"
    history: str = "forget"

    @property
    def levels(self) -> int:
        """How many times the grid grows."""
        return len(self.stages) - 1

    @property
    def steps(self) -> int:
        """How many steps the whole schedule has, evaluated or not."""
        return self.stages[-1].end

    @property
    def forwards(self) -> int:
        """How many steps evaluate the model."""
        return sum(len(stage.evaluated) for stage in self.stages)

    def token_step_ratio(self) -> float:
        """Image tokens summed over all evaluations, divided by that sum for full resolution at every step."""
        return 1 / self.flop_speedup(float)

    def flops(self, forward_flops: Callable[[int], float]) -> float:
        """FLOPs of all evaluations; `forward_flops` maps a number of image tokens to one forward's FLOPs."""
        return sum(forward_flops(stage.tokens) * len(stage.evaluated) for stage in self.stages)

    def flop_speedup(self, forward_flops: Callable[[int], float]) -> float:
        """FLOPs of full resolution at every step, divided by this plan's.

        This bounds the speed-up on a machine whose limit is FLOPs.
        """
        return forward_flops(self.stages[-1].tokens) * self.steps / self.flops(forward_flops)


def alignment(ratio: Any, sigma: Any) -> Any:
    """κ, the factor on latents and σ when the grid's sides grow by `ratio` r at noise level σ.

    A finer grid spreads the picture's energy over r² as many orthonormal coefficients, so the picture
    shrinks by r against fresh noise. `κ = r / (1 + (r-1)·σ)` restores `x = (1-σ̃)·x_0 + σ̃·ε` at `σ̃ = κ·σ`
    (arXiv 2605.18736, spectral noise expansion).
    """
    return ratio / (1 + (ratio - 1) * sigma)


def activation_thresholds(levels: Sequence[Level], spectrum: Spectrum, delta: float) -> list[float]:
    """For each of `levels` but the last, the σ below which it is too coarse: t(ω) of its Nyquist frequency.

    Raises UsageError unless 0 < δ < 1.
    """
    if not 0 < delta < 1:
        raise UsageError(f"progressive delta must lie between 0 and 1, not {delta:g}")
    return [spectrum.activation_time(level.nyquist, delta) for level in levels[:-1]]


def make_plan(
    levels: Sequence[Level],
    schedules: Sequence[Sequence[float] | np.ndarray],
    thresholds: Sequence[float],
    *,
    mode: str,
    tokens: Callable[[tuple[int, int]], int],
    transform: str = "dct",
    delta: float | None = None,
    respace: bool = False,
    noise: str = "shared",
    history: str = "forget",
) -> Plan:
    """Divides n steps among `levels`: stage s+1 starts at the first step i with `σ_i ≤ thresholds[s]`.

    Each level has a schedule of n + 1 noise levels, which fall to the clean picture's. In the published
    method all levels have full resolution's schedule. The mode `dct_rewind` replaces a new stage's first
    noise level by the aligned σ̃. With `respace`, the stage's other noise levels are spread evenly over the
    part of its schedule below σ̃. The mode `fullres` keeps the last level only.

    `tokens` maps a grid `(h, w)` to its number of image tokens. The plan records `delta`, `noise` and
    `history` as given. Raises UsageError for an unknown mode, noise or history, for a transform that cannot
    make these levels, and for a stage without a step or with rising noise.
    """
    if mode not in MODES:
        raise UsageError(f"unknown progressive mode {mode!r}; use one of {', '.join(MODES)}")
    if noise not in NOISES:
        raise UsageError(f"unknown progressive noise {noise!r}; use {' or '.join(NOISES)}")
    if history not in HISTORIES:
        raise UsageError(f"unknown progressive history {history!r}; use {' or '.join(HISTORIES)}")
    schedules = [[float(sigma) for sigma in schedule] for schedule in schedules]
    steps = len(schedules[-1]) - 1
    if steps < 1:
        raise UsageError(f"the number of inference steps must be 1 or more, not {steps}")
    if mode == "fullres":
        levels, schedules, thresholds = levels[-1:], schedules[-1:], ()
    check_transform(transform, levels)
    start, sigma, stages = 0, schedules[0][0], []
    for number, (level, schedule) in enumerate(zip(levels, schedules, strict=True)):
        kappa = 1.0
        if number and mode == "dct_rewind":
            kappa = alignment(level.scale / levels[number - 1].scale, sigma)
        sigmas = [kappa * sigma, *schedule[start + 1 :]]
        if number and respace:
            sigmas = respaced(schedule, start, kappa * sigma)
        end = steps
        if number < len(levels) - 1:
            reached = [sigma, *sigmas[1:]]
            end = next((start + i for i, s in enumerate(reached) if s <= thresholds[number]), steps)
        if start >= end:
            h, w = level.latent
            cure = "more steps or fewer levels"
            if number == len(levels) - 1:
                cure = "more steps, fewer levels or a " + ("smaller delta" if delta else "larger sigma")
            raise UsageError(
                f"stage {number + 1} of {len(levels)} (latent {h}×{w}) would have no step among {steps}"
                + (f" at delta {delta:g}" if delta else "")
                + f"; use {cure}"
            )
        if sigmas[0] <= sigmas[1]:
            raise UsageError(
                f"stage {number + 1} of {len(levels)} would start at σ {sigmas[0]:.3f} and go up to "
                f"{sigmas[1]:.3f}; use dct_rewind, or progressive respace"
            )
        stages.append(
            Stage(
                latent=level.latent,
                tokens=tokens(level.latent),
                start=start,
                end=end,
                sigma=sigma,
                kappa=kappa,
                sigmas=tuple(sigmas[: end - start + 1]),
            )
        )
        start, sigma = end, sigmas[end - start]
    return Plan(mode, transform, delta, tuple(stages), noise, history)


def respaced(schedule: Sequence[float] | np.ndarray, start: int, sigma: float) -> list[float]:
    """Noise levels from `sigma` to the end of `schedule`, in as many steps as it has after `start`.

    They are spaced evenly in the schedule's index, interpolated linearly: where it is dense, they are dense.
    """
    steps = len(schedule) - 1
    position = np.interp(-sigma, np.negative(schedule), np.arange(steps + 1))
    even = np.linspace(position, steps, steps - start + 1)[1:]
    return [sigma, *np.interp(even, np.arange(steps + 1), schedule).tolist()]
