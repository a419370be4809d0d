"""`--speed`: one word for where to stand between quality and speed.

`speed.json` is the table: what each speed sets, and the figures it rests on, which `bench/frontier.py`
measured on the demo and writes there. Does not import jax.
"""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxspd.errors import UsageError
from jaxspd.request import SamplingParams

if TYPE_CHECKING:  # it would import jax, which the command's help has no use for
    from jaxspd.spectral.plan import Plan

log = logging.getLogger("jaxspd")

# A model whose card asks for no more steps was distilled for them: other steps, or another solver, are not
# what it has learnt.
DISTILLED_STEPS = 10


@dataclass(frozen=True)
class Speed:
    """What a speed `sets`, parameters of a request; and how it fared on the `demo`: `faster`, how many times
    fewer FLOPs it takes than full resolution at the published steps; `latents` and `psnr`, how near in dB
    latents and pictures came to those of full resolution at many steps, and `ssim`.
    """

    sets: dict[str, Any]
    demo: dict[str, float]


TABLE = Path(__file__).with_suffix(".json")
SPEEDS = {name: Speed(**entry) for name, entry in json.loads(TABLE.read_text()).items()}
# All that any of them sets.
SETS = frozenset(name for speed in SPEEDS.values() for name in speed.sets)


def at_speed(family, params: SamplingParams) -> SamplingParams:
    """`params`, of which what nobody asked for is as their speed sets it. UsageError for an unknown speed.

    Never more steps than the model card's. A model distilled for few steps stays as it is, with a notice.
    """
    if params.speed is None:
        return params
    if params.speed not in SPEEDS:
        raise UsageError(f"unknown speed {params.speed!r}; use one of {', '.join(SPEEDS)}")
    sets = dict(SPEEDS[params.speed].sets)
    if sets and family.default_steps <= DISTILLED_STEPS:
        log.warning(
            "%s is distilled for %d steps, which speed leaves as they are", family.title, family.default_steps
        )
        return params
    if sets:
        sets["num_inference_steps"] = min(family.default_steps, sets["num_inference_steps"])
    if params.progressive_sigmas is not None:  # they say where the grid grows, instead of a delta
        sets.pop("progressive_delta", None)
    return replace(params, **{name: value for name, value in sets.items() if getattr(params, name) is None})


def speed_report(family, name: str, plan: "Plan") -> dict[str, Any]:
    """What the speed `name` means for `family`, whose `plan` it became; `faster` counts FLOPs against the
    published steps at full resolution.
    """
    speed = SPEEDS[name]
    faster = plan.flop_speedup(family.forward_flops) * family.default_steps / plan.steps
    return {"name": name, "sets": speed.sets, "faster": faster, "demo": speed.demo}


def speed_lines(family, name: str, plan: "Plan") -> str:
    """The same for people."""
    told = speed_report(family, name, plan)
    demo, steps = told["demo"], family.default_steps
    flags = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in told["sets"].items())
    return (
        f"speed {name}: {flags or 'full resolution, steps and solver as published'}\n"
        f"{told['faster']:.2f}× fewer FLOPs than {steps} steps at full resolution; on the demo "
        f"{demo['faster']:.2f}×, and {demo['psnr']:.1f} dB PSNR to the picture of many steps"
    )
