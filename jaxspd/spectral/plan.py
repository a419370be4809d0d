"""What a request will run: its stages, decided on the host before anything is compiled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxspd.errors import UsageError
from jaxspd.spectral.levels import Level
from jaxspd.spectral.spectrum import Spectrum

MODES = ("fullres", "dct", "dct_rewind")


@dataclass(frozen=True)
class Stage:
    """Consecutive denoising steps on one grid.

    `start` and `end` count steps of the whole schedule, `end` exclusive. `sigmas` holds the
    `end - start + 1` noise levels that the steps run between; its first entry is `aligned_sigma`.
    `sigma` is the schedule's own entry at `start`, and `kappa` the factor that aligned it (1 where
    nothing was aligned).
    """

    latent: tuple[int, int]
    tokens: int
    start: int
    end: int
    sigma: float
    kappa: float
    sigmas: tuple[float, ...]

    @property
    def aligned_sigma(self) -> float:
        return self.sigmas[0]

    @property
    def steps(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Plan:
    """The stages of one generation, coarsest first."""

    mode: str
    delta: float
    stages: tuple[Stage, ...]

    @property
    def levels(self) -> int:
        return len(self.stages) - 1

    @property
    def steps(self) -> int:
        return self.stages[-1].end

    def token_step_ratio(self) -> float:
        """Image tokens summed over all steps, as a share of what full resolution would take."""
        full = self.stages[-1].tokens * self.steps
        return sum(stage.tokens * stage.steps for stage in self.stages) / full

    def flop_speedup(self, forward_flops: Callable[[int], float]) -> float:
        """Full resolution's FLOPs over this plan's; `forward_flops` maps image tokens to one
        forward's. No implementation can be faster by more on a machine that FLOPs limit.
        """
        full = forward_flops(self.stages[-1].tokens) * self.steps
        return full / sum(forward_flops(stage.tokens) * stage.steps for stage in self.stages)


def alignment(ratio: float, sigma: float) -> float:
    """κ, by which latents and σ are scaled when the grid grows by `ratio` at noise level σ.

    Growing the grid spreads the picture's energy over `ratio²` as many orthonormal coefficients, so
    the picture shrinks by `ratio` against fresh noise; `κ = r / (1 + (r-1)·σ)` restores
    `x = (1-σ̃)·x_0 + σ̃·ε` at `σ̃ = κ·σ` (arXiv 2605.18736, spectral noise expansion).
    """
    return ratio / (1 + (ratio - 1) * sigma)


def make_plan(
    levels: Sequence[Level],
    sigmas: Sequence[float],
    spectrum: Spectrum,
    *,
    mode: str,
    delta: float,
    tokens: Callable[[tuple[int, int]], int],
) -> Plan:
    """Divides a schedule of n steps (`sigmas`: n + 1 entries, falling to the clean picture) among
    `levels`: stage s+1 starts at the first step i with `σ_i ≤ t(ω_s)`.

    `fullres` keeps the last level only. Raises UsageError for an unknown mode, δ outside (0, 1), or
    a stage without a step.
    """
    if mode not in MODES:
        raise UsageError(f"unknown progressive mode {mode!r}; use one of {', '.join(MODES)}")
    if not 0 < delta < 1:
        raise UsageError(f"progressive delta must lie between 0 and 1, not {delta:g}")
    steps = len(sigmas) - 1
    if steps < 1:
        raise UsageError(f"the number of inference steps must be 1 or more, not {steps}")
    if mode == "fullres":
        levels = levels[-1:]
    starts = [0]
    for level in levels[:-1]:
        threshold = spectrum.activation_time(level.nyquist, delta)
        starts.append(next((i for i in range(steps) if sigmas[i] <= threshold), steps))
    ends = [*starts[1:], steps]
    stages = []
    for number, (level, start, end) in enumerate(zip(levels, starts, ends, strict=True)):
        if start >= end:
            h, w = level.latent
            cure = "more steps, fewer levels or a smaller delta"
            if number < len(levels) - 1:
                cure = "more steps or fewer levels"
            raise UsageError(
                f"stage {number + 1} of {len(levels)} (latent {h}×{w}) would have no step among "
                f"{steps} at delta {delta:g}; use {cure}"
            )
        sigma = float(sigmas[start])
        kappa = 1.0
        if number and mode == "dct_rewind":
            kappa = alignment(level.scale / levels[number - 1].scale, sigma)
        stages.append(
            Stage(
                latent=level.latent,
                tokens=tokens(level.latent),
                start=start,
                end=end,
                sigma=sigma,
                kappa=kappa,
                sigmas=(kappa * sigma, *map(float, sigmas[start + 1 : end + 1])),
            )
        )
    return Plan(mode, delta, tuple(stages))
