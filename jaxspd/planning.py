"""From a request and a family to the plan that will run."""

import logging
import math
from dataclasses import replace

from jaxspd.errors import UsageError
from jaxspd.params import SamplingParams
from jaxspd.sampling.solvers import SOLVERS, default_solver
from jaxspd.spectral.levels import halvings
from jaxspd.spectral.plan import MODES, Plan, make_plan

log = logging.getLogger("jaxspd")


def complete(family, params: SamplingParams) -> SamplingParams:
    """`params` with the checkpoint's defaults filled in; UsageError for what `family` cannot do.

    Where the family rounds sizes, or nobody asked for one, height and width come back rounded down, with
    a warning.
    """
    scheduler = params.scheduler or default_solver(family.scheduler)
    if scheduler not in SOLVERS:
        raise UsageError(f"unknown scheduler {scheduler!r}; use one of {', '.join(sorted(SOLVERS))}")
    guidance = family.default_guidance if params.guidance_scale is None else params.guidance_scale
    if not math.isfinite(guidance):
        raise UsageError(f"guidance_scale must be a finite number, not {guidance}")
    if params.negative_prompt and not family.guided(guidance):
        cure = "raise guidance_scale above 1 or leave it out" if family.guided(math.inf) else "leave it out"
        raise UsageError(f"{family.title} reads no negative prompt at guidance scale {guidance:g}; {cure}")
    negative = params.negative_prompt
    if family.guided(guidance) and negative is None:
        negative = family.default_negative_prompt
    grid = params.progressive_grid or next(iter(family.expansions))
    if grid not in family.expansions:
        raise UsageError(f"{family.title} has no {grid!r} grid to grow; use {' or '.join(family.expansions)}")
    height, width = pixel_size(family, params)
    return replace(
        params,
        progressive_grid=grid,
        num_inference_steps=params.num_inference_steps or family.default_steps,
        guidance_scale=guidance,
        negative_prompt=negative,
        scheduler=scheduler,
        num_frames=frames(family, params),
        fps=params.fps or family.default_fps,
        height=height,
        width=width,
    )


def plan_request(family, params: SamplingParams) -> Plan:
    """The stages that `params` asks of `family`; UsageError where it asks the impossible."""
    params = complete(family, params)
    mode, leading = params.progressive_mode, family.leading(params.num_frames)
    latent = params.height // family.pixels_per_latent, params.width // family.pixels_per_latent

    def tokens(grid: tuple[int, int]) -> int:
        return family.tokens((*leading, *grid))

    return make_plan(
        halvings(latent, used_levels(params)),
        family.sigmas(params.num_inference_steps, tokens(latent), params.flow_shift),
        family.spectrum,
        mode=mode,
        delta=params.progressive_delta,
        tokens=tokens,
    )


def used_levels(params: SamplingParams) -> int:
    """How many times the grid is halved: not at all in `fullres`."""
    if params.progressive_mode not in MODES:
        raise UsageError(
            f"unknown progressive mode {params.progressive_mode!r}; use one of {', '.join(MODES)}"
        )
    if params.progressive_levels < 0:
        raise UsageError(f"progressive levels must be 0 or more, not {params.progressive_levels}")
    return 0 if params.progressive_mode == "fullres" else params.progressive_levels


def pixel_size(family, params: SamplingParams) -> tuple[int, int]:
    """Height and width for which every stage's grid exists."""
    levels = used_levels(params)
    default_height, default_width = family.default_size
    height, width = params.height or default_height, params.width or default_width
    smallest = family.pixel_multiple
    most = 0
    while smallest << (most + 1) <= min(height, width):
        most += 1
    if levels > most and min(height, width) >= smallest:
        raise UsageError(
            f"{levels} progressive levels are too many for {width}×{height} pixels; use at most {most}"
        )
    multiple = smallest << levels
    if height % multiple == width % multiple == 0:
        return height, width
    needs = (
        f"{family.title} with {levels} progressive level{'s' * (levels != 1)} needs height and width in "
        f"multiples of {multiple}"
    )
    asked = params.height or params.width
    if (family.aligns_size or not asked) and min(height, width) >= multiple:
        aligned = height // multiple * multiple, width // multiple * multiple
        log.warning("%s: %d by %d becomes %d by %d", needs, height, width, *aligned)
        return aligned
    nearest = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
    raise UsageError(f"{needs}; the nearest to {height} by {width} is {nearest[0]} by {nearest[1]}")


def frames(family, params: SamplingParams) -> int:
    """Frames of the video, 1 for a picture."""
    asked = params.num_frames or family.default_frames
    if family.default_fps is None:
        if asked != 1 or params.fps:
            raise UsageError(f"{family.title} makes pictures; leave num_frames and fps out")
        return 1
    unit = family.frames_per_latent
    if (asked - 1) % unit:
        nearest = (asked - 1 + unit // 2) // unit * unit + 1  # of two as near, the larger
        raise UsageError(
            f"{family.title} makes {unit}k + 1 frames; the nearest num_frames to {asked} is {nearest}"
        )
    return asked


def plan_report(family, plan: Plan) -> dict:
    """The plan as `jaxspd plan --json` prints it."""
    return {
        "family": family.name,
        "mode": plan.mode,
        "levels": plan.levels,
        "delta": plan.delta,
        "stages": [
            {
                "latent": list(stage.latent),
                "tokens": stage.tokens,
                "start": stage.start,
                "end": stage.end,
                "sigma": stage.sigma,
                "aligned_sigma": stage.aligned_sigma,
            }
            for stage in plan.stages
        ],
        "token_step_ratio": plan.token_step_ratio(),
        "flop_speedup": plan.flop_speedup(family.forward_flops),
    }


def plan_table(family, plan: Plan) -> str:
    """The plan for people to read."""
    lines = [
        f"{family.title}, {plan.mode}"
        + (f", {plan.levels} level{'s' * (plan.levels > 1)}, δ = {plan.delta:g}" if plan.levels else ""),
        f"{'stage':>5}  {'latent':>9}  {'tokens':>6}  {'steps':>9}  {'σ':>8}  {'aligned σ':>9}",
    ]
    for number, stage in enumerate(plan.stages, 1):
        h, w = stage.latent
        lines.append(
            f"{number:>5}  {f'{h}×{w}':>9}  {stage.tokens:>6}  {f'{stage.start}–{stage.end - 1}':>9}  "
            f"{stage.sigma:>8.6f}  {stage.aligned_sigma:>9.6f}"
        )
    lines.append(
        f"{plan.token_step_ratio():.0%} of full resolution's token steps; "
        f"at most {plan.flop_speedup(family.forward_flops):.2f}× faster, by FLOPs"
    )
    return "\n".join(lines)
