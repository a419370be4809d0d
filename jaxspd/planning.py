"""From a request and a family to the plan that will run."""

from jaxspd.errors import UsageError
from jaxspd.params import SamplingParams
from jaxspd.spectral.levels import halvings
from jaxspd.spectral.plan import MODES, Plan, make_plan


def plan_request(family, params: SamplingParams) -> Plan:
    """The stages that `params` asks of `family`; UsageError where it asks the impossible."""
    mode = params.progressive_mode
    if mode not in MODES:
        raise UsageError(f"unknown progressive mode {mode!r}; use one of {', '.join(MODES)}")
    if params.progressive_levels < 0:
        raise UsageError(f"progressive levels must be 0 or more, not {params.progressive_levels}")
    levels = 0 if mode == "fullres" else params.progressive_levels
    latent = latent_grid(family, params, levels)
    return make_plan(
        halvings(latent, levels),
        family.sigmas(params.num_inference_steps or family.default_steps, latent),
        family.spectrum,
        mode=mode,
        delta=params.progressive_delta,
        tokens=family.tokens,
    )


def latent_grid(family, params: SamplingParams, levels: int) -> tuple[int, int]:
    """The full-resolution latent grid (h, w), after checking that every stage's grid exists."""
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
    nearest = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
    if [height, width] != nearest:
        raise UsageError(
            f"{family.title} with {levels} progressive levels needs height and width in multiples "
            f"of {multiple}; the nearest to {height} by {width} is {nearest[0]} by {nearest[1]}"
        )
    return height // family.pixels_per_latent, width // family.pixels_per_latent


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
