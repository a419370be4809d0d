"""Two models that take turns: one for much noise, and one for less."""

from collections.abc import Callable
from dataclasses import replace

from jaxspd.spectral.plan import Plan


def divided_plan(plan: Plan, is_second: Callable[[float], bool]) -> Plan:
    """`plan`, with the steps noted that are the second model's, by the noise level at which each begins.

    Where the grid grows the noise level may rise, and then the first model may have another turn.
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
