"""`--speed`: one word that chooses between quality and speed. Does not import jax.

The table `speed.json` holds what each speed sets, and the figures behind it, which `bench/frontier.py`
measures on the demo and writes there.
"""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxspd.errors import UsageError
from jaxspd.request import SamplingParams

if TYPE_CHECKING:  # it would import jax, which the command's help does not need
    from jaxspd.spectral.plan import Plan

log = logging.getLogger("jaxspd")

# A model whose card asks for no more steps than this was distilled for them. It has not learnt other steps or
# another solver.
DISTILLED_STEPS = 10


@dataclass(frozen=True)
class Speed:
    """The request parameters that a speed `sets`, and its figures on the `demo`.

    `faster` is the FLOPs of full resolution at the published steps, divided by this speed's. `latents` and
    `psnr` are the PSNR in dB of latents and pictures, and `ssim` is the pictures' SSIM, to those of full
    resolution at many steps.
    """

    sets: dict[str, Any]
    demo: dict[str, float]


TABLE = Path(__file__).with_suffix(".json")
SPEEDS = {name: Speed(**entry) for name, entry in json.loads(TABLE.read_text()).items()}
# All parameters that some speed sets.
SETS = frozenset(name for speed in SPEEDS.values() for name in speed.sets)


def at_speed(family, params: SamplingParams) -> SamplingParams:
    """`params` with the values of their speed for what the user did not set.

    The steps are never more than the model card's. For a model that is distilled for few steps, `params` stay
    as they are, with a notice. Raises UsageError for an unknown speed.
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
    if params.progressive_sigmas is not None:  # they replace delta and say where the grid grows
        sets.pop("progressive_delta", None)
    return replace(params, **{name: value for name, value in sets.items() if getattr(params, name) is None})


def speed_report(family, name: str, plan: "Plan") -> dict[str, Any]:
    """What the speed `name` means for `family`, for which it gave `plan`.

    `faster` is the FLOPs of the published steps at full resolution, divided by the plan's.
    """
    speed = SPEEDS[name]
    faster = plan.flop_speedup(family.forward_flops) * family.default_steps / plan.steps
    return {"name": name, "sets": speed.sets, "faster": faster, "demo": speed.demo}


def speed_lines(family, name: str, plan: "Plan") -> str:
    """The same report in lines for people to read."""
    told = speed_report(family, name, plan)
    demo, steps = told["demo"], family.default_steps
    flags = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in told["sets"].items())
    return (
        f"speed {name}: {flags or 'full resolution, steps and solver as published'}\n"
        f"{told['faster']:.2f}× fewer FLOPs than {steps} steps at full resolution; on the demo "
        f"{demo['faster']:.2f}×, and {demo['psnr']:.1f} dB PSNR to the picture of many steps"
    )
