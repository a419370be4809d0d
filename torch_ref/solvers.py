"""Stepping from sigma to sigma with diffusers' schedulers, also when the grid grows in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from torch_ref.forecast import Forecaster
from torch_ref.spectral import Growth, Segment, expand, kappa, segments

Scheduler = FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler


def solver_on(schedule: Scheduler, rule: Literal["unipc", "euler"]) -> Scheduler:
    """A scheduler that steps along the sigmas of ``schedule`` by ``rule``.

    It is ``schedule`` itself if that steps so. UniPC needs the logarithm of ``1 - sigma``, so on another
    scheduler's sigmas it starts at 1 - 1e-6, as it does on its own.
    """
    if rule == "unipc":
        solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    elif rule == "euler":
        solver = FlowMatchEulerDiscreteScheduler()
    else:
        raise ValueError(f"unknown scheduler {rule!r}")
    if isinstance(schedule, type(solver)):
        return schedule
    # Neither scheduler shifts the sigmas again: both have a shift of 1 by default.
    solver.set_timesteps(sigmas=schedule.sigmas[:-1].numpy())
    solver.set_begin_index(0)
    return solver


def forget(solver: UniPCMultistepScheduler) -> None:
    """Makes UniPC's next step its first: of first order, with no corrector before it."""
    solver.lower_order_nums = 0
    solver.last_sample = None
    solver.model_outputs = [None] * solver.config.solver_order


def carry(
    before: Scheduler,
    after: Scheduler,
    first: int,
    ratio: float,
    grow: Callable[[torch.Tensor, float, float], torch.Tensor],
) -> None:
    """Gives the history of ``before`` to ``after``, as it would be on the finer grid.

    The next step of ``after`` has the number ``first``. ``grow`` expands latents at a sigma and scales them
    by a factor. ``ratio`` is the ratio of the grids' scales if noise levels are aligned, else 1. Euler has no
    history.
    """
    if not isinstance(before, UniPCMultistepScheduler):
        return
    known = before.lower_order_nums
    sigmas = before.sigmas[first - known : first].tolist()
    aligned = [kappa(sigma, ratio) * sigma for sigma in sigmas]
    after.sigmas[first - known : first] = torch.tensor(aligned)
    after.last_sample = grow(before.last_sample, sigmas[-1], kappa(sigmas[-1], ratio))
    # These are predictions of the clean picture, which is at sigma 0.
    after.model_outputs = [
        None if clean is None else grow(clean, 0.0, ratio) for clean in before.model_outputs
    ]
    after.lower_order_nums, after.this_order = known, before.this_order


def grow(
    latents: torch.Tensor,
    noise: torch.Tensor,
    segment: Segment,
    ratio: float,
    solvers: tuple[Scheduler, Scheduler],
    growth: Growth,
    expand: Callable[..., torch.Tensor] = expand,
) -> torch.Tensor:
    """``latents`` grown to the grid of ``noise``, where ``segment`` begins.

    ``ratio`` is the ratio of the grids' scales. The second of the ``solvers``, which may be the same as the
    first, continues, with the history that ``growth`` lets it keep.
    """

    def grown(x: torch.Tensor, sigma: float, factor: float) -> torch.Tensor:
        return factor * expand(x, noise, sigma, growth.transform)

    if growth.history == "carry":
        carry(*solvers, segment.start, ratio if growth.mode == "dct_rewind" else 1.0, grown)
    elif isinstance(solvers[1], UniPCMultistepScheduler):
        forget(solvers[1])
    return grown(latents, segment.before, segment.factor)


def denoise(
    schedule: Callable[[int, int], FlowMatchEulerDiscreteScheduler],
    velocity: Callable[[torch.Tensor, float], torch.Tensor],
    noises: Sequence[torch.Tensor],
    growth: Growth,
    expand: Callable[..., torch.Tensor] = expand,
) -> torch.Tensor:
    """Clean latents ``[..., h, w]`` after all stages.

    ``schedule(h, w)`` makes a fresh scheduler with the time steps of that latent grid, whose sigmas may be
    edited. ``noises`` are those of :func:`stage_noises`. ``velocity`` evaluates the model at latents and a
    sigma.
    """
    height, width = noises[-1].shape[-2:]
    schedulers = [solver_on(schedule(*grid), growth.scheduler) for grid in growth.schedule_grids(noises)]
    sigmas = [scheduler.sigmas[:-1].tolist() for scheduler in schedulers]
    latents, forecaster = noises[0], Forecaster(growth.forecast)
    for stage, (segment, scheduler) in enumerate(
        zip(segments(growth, sigmas, height, width), schedulers, strict=True)
    ):
        if stage:
            ratio, solvers = (
                growth.ladder[stage] / growth.ladder[stage - 1],
                (schedulers[stage - 1], scheduler),
            )
            latents = grow(latents, noises[stage], segment, ratio, solvers, growth, expand)
            forecaster.forget()
        scheduler.set_begin_index(segment.start)
        scheduler.sigmas[segment.start : segment.start + len(segment.sigmas)] = torch.tensor(segment.sigmas)
        for i, sigma in enumerate(segment.sigmas[:-1], segment.start):
            predicted = forecaster(i, sigma, lambda x=latents, sigma=sigma: velocity(x, sigma))
            latents = scheduler.step(predicted, scheduler.timesteps[i], latents).prev_sample
    return latents
