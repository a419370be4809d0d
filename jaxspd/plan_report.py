"""Reports on a plan, for programs and for people."""

import itertools
from operator import itemgetter

from jaxspd.spectral.plan import Plan


def plan_report(family, plan: Plan) -> dict:
    """The plan as a dictionary, which `jaxspd plan --json` prints."""
    return {
        "family": family.name,
        "mode": plan.mode,
        "levels": plan.levels,
        "transform": plan.transform,
        "delta": plan.delta,
        "noise": plan.noise,
        "history": plan.history,
        "stages": [
            {
                "latent": list(stage.latent),
                "tokens": stage.tokens,
                "start": stage.start,
                "end": stage.end,
                "evaluated": stage.evaluated,
                **({"second": sorted(stage.second)} if any(s.second for s in plan.stages) else {}),
                "sigma": stage.sigma,
                "aligned_sigma": stage.aligned_sigma,
            }
            for stage in plan.stages
        ],
        "steps": plan.steps,
        "forwards": plan.forwards,
        "token_step_ratio": plan.token_step_ratio(),
        "flop_speedup": plan.flop_speedup(family.forward_flops),
    }


def plan_table(family, plan: Plan) -> str:
    """The plan as a table for people to read."""
    lines = [
        f"{family.title}, {plan.mode}"
        + (f", {plan.levels} level{'s' * (plan.levels > 1)}" if plan.levels else "")
        + (f" in {plan.transform}" if plan.transform != "dct" else "")
        + (f", δ = {plan.delta:g}" if plan.levels and plan.delta else ""),
        f"{'stage':>5}  {'latent':>9}  {'tokens':>6}  {'steps':>9}  {'σ':>8}  {'aligned σ':>9}",
    ]
    for number, stage in enumerate(plan.stages, 1):
        h, w = stage.latent
        lines.append(
            f"{number:>5}  {f'{h}×{w}':>9}  {stage.tokens:>6}  {f'{stage.start}–{stage.end - 1}':>9}  "
            f"{stage.sigma:>8.6f}  {stage.aligned_sigma:>9.6f}"
        )
    if any(stage.second for stage in plan.stages):
        steps = ((step, step in s.second) for s in plan.stages for step in range(s.start, s.end))
        told = []
        for second, turn in itertools.groupby(steps, key=itemgetter(1)):
            numbers = [step for step, _ in turn]
            told.append(f"{'second' if second else 'first'} {numbers[0]}–{numbers[-1]}")
        lines.append(f"steps of the two transformers: {', '.join(told)}")
    if plan.forwards < plan.steps:
        evaluated = [str(step) for stage in plan.stages for step in stage.evaluated]
        lines.append(
            f"{plan.forwards} of {plan.steps} steps evaluate the model: {', '.join(evaluated)}; the "
            "others are forecast"
        )
    lines.append(
        f"{plan.token_step_ratio():.0%} of full resolution's token steps; "
        f"at most {plan.flop_speedup(family.forward_flops):.2f}× faster, by FLOPs"
    )
    return "\n".join(lines)
