"""From noise to frames, when everything is compiled and encoded."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxspd import processes
from jaxspd.components.denoiser import Denoiser
from jaxspd.components.pipeline import Components
from jaxspd.request import Request
from jaxspd.results import Output
from jaxspd.runtime.memory import memory_for
from jaxspd.sampling.guidance import Guided
from jaxspd.sampling.loop import Step, denoise
from jaxspd.sampling.programs import Programs
from jaxspd.spectral.plan import Plan
from jaxspd.tasks import Task

# The frames in processes other than the first.
NOTHING = np.zeros((0, 0, 0, 3), np.uint8)


def run(
    components: Components,
    denoiser: Denoiser,
    programs: Programs,
    plan: Plan,
    request: Request,
    conditioning: Any,
    batch: Sequence[Task],
    tell: Callable[[Step], None],
) -> Iterator[Output]:
    """Yields the outputs of `batch`, which are denoised in one batch and decoded one by one.

    Each output has its row of `conditioning`, and `request` holds what they have in common. `tell` is called
    with every step, and an exception from it ends the run.
    """

    def take(second: bool) -> tuple[Any, Any]:
        """The weights of the first or the second transformer, once they are loaded, and its conditioning."""
        own = conditioning
        if second and isinstance(own, Guided):
            own = own._replace(scale=np.full_like(own.scale, request.guidance_scale_2))
        return denoiser.turns.take(int(second)), own

    seeds = [task.request["seed"] for task in batch]
    noises = programs.noises(plan, seeds, denoiser.family.leading(request.num_frames))
    with denoiser.turns.alone():
        clean, taken = denoise(programs, plan, None, None, noises, tell, take)
    for row, task in enumerate(batch):
        begin = time.perf_counter()
        with memory_for(f"decoding {request.width}×{request.height} pixels"):
            frames = components.decode(np.asarray(clean)[[row]])[0] if processes.first() else NOTHING
        seconds = {"denoise": taken, "decode": time.perf_counter() - begin}
        yield Output(frames, task.request, task.path, seconds)
        del frames  # otherwise they would stay in memory beside the next ones
