"""Two models that take turns: the first at high noise levels, the second at low ones."""

from collections.abc import Callable
from dataclasses import replace

from jaxspd.spectral.plan import Plan


def divided_plan(plan: Plan, is_second: Callable[[float], bool]) -> Plan:
    """`plan` with the second model's steps marked: those for which `is_second` holds at their first σ.

    The noise level may rise where the grid grows, and then the first model may have another turn.
    """
    stages = [
        replace(
            stage,
            second=frozenset(
                step for step, sigma in enumerate(stage.sigmas[:-1], stage.start) if is_second(sigma)
            ),
        )
        for stage in plan.stages
    ]
    return replace(plan, stages=tuple(stages))
