"""Requests of equal shape, made in one batch."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxspd.components.denoiser import Denoiser
from jaxspd.components.pipeline import Components
from jaxspd.conditioning import conditionings
from jaxspd.media.output import output_format
from jaxspd.planning import plan_request, reading
from jaxspd.request import Request
from jaxspd.results import Output, Progress, Watch
from jaxspd.running import run
from jaxspd.sampling.loop import Step
from jaxspd.sampling.programs import peak_bytes
from jaxspd.source import Source
from jaxspd.tasks import Task, tasks


def shape(request: Request) -> str:
    """A key that two requests must share to be made together: all parameters but prompts and seed.

    A request for several outputs is made alone.
    """
    return repr(replace(request, prompt=None, prompt_suffix=None, negative_prompt=None, seed=0))


def ready(denoiser: Denoiser, request: Request, count: int) -> bool:
    """Whether `together` has all programs for `count` requests of the shape of `request`.

    If not, their compilation is started, but not waited for. The result is always False if several devices
    share the work of one output. Raises UsageError if the device has too little memory for so many.
    """
    if denoiser.spread:
        return False
    family, plan = reading(denoiser.family, request), plan_request(denoiser.family, request)
    programs, prepared, _ = denoiser.prepare(family, request, plan, count)
    done = all(program.done() for program in prepared)
    if done:
        programs.wait(prepared)  # raises the error of a failed compilation
    return done


def together(
    components: Components,
    denoiser: Denoiser,
    source: Source,
    requests: Sequence[Request],
    watches: Sequence[Watch],
) -> Iterator[Output]:
    """Yields an output for each of `requests`, which have one shape, by the model `source`.

    They share a batch, so an output's last bits may differ from those that it has alone. Each of `watches` is
    called with every step of its own output, and an exception from it ends the run. Nothing is written to
    files.
    """
    first = requests[0]
    family, plan = reading(denoiser.family, first), plan_request(denoiser.family, first)
    kind = output_format(first.output_format, None, first.num_frames)
    denoiser.load().result()
    programs, prepared, _ = denoiser.prepare(family, first, plan, len(requests))
    batch: list[Task] = []
    conditioned: list[Any] = []
    for request in requests:
        [task] = tasks(family, replace(request, output_format=kind), source.report, save=False)
        text = task.request["prompt"] + task.request["prompt_suffix"]
        batch.append(task)
        conditioned += conditionings(components, family, [text], request, {"encode": 0.0})
    programs.wait(prepared)
    components.residency.leave(peak_bytes(prepared))

    def preview(row: int, latents: np.ndarray) -> np.ndarray:
        return components.preview(latents[[row]])

    def tell(step: Step) -> None:
        for row, watch in enumerate(watches):
            watch(Progress(plan, step, partial(preview, row)))

    conditioning = jax.tree.map(lambda *rows: np.concatenate(rows), *conditioned)
    yield from run(components, denoiser, programs, plan, first, conditioning, batch, tell)
