"""The staged denoising loop."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import numpy as np

from jaxspd.errors import UsageError
from jaxspd.runtime.memory import memory_for
from jaxspd.sampling.forecast import weights
from jaxspd.sampling.programs import Programs
from jaxspd.spectral.plan import Plan


@dataclass(frozen=True)
class Step:
    """A step that is done: the `number` of its `stage` and its own (from 0), the noise level that it began at
    and the one that it `reached`, and latents `[B, C, ...]` before and after.
    """

    stage: int
    number: int
    sigma: float
    reached: float
    before: jax.Array
    after: np.ndarray

    def clean(self) -> np.ndarray:
        """The clean latents, float32, to which the straight line through `before` and `after` leads: of an
        Euler step the model's own prediction, `x - σ·v`.
        """
        if self.reached == self.sigma:  # a step that goes nowhere points nowhere
            return self.after
        return self.after + self.reached / (self.sigma - self.reached) * (
            self.after - np.asarray(self.before)
        )


Progress = Callable[[Step], None]


@memory_for("denoising")
def denoise(
    programs: Programs,
    plan: Plan,
    parameters,
    conditioning,
    noises: Sequence[np.ndarray],
    progress: Progress = lambda step: None,
    take: Callable[[bool], tuple[Any, Any]] | None = None,
) -> tuple[jax.Array, list[float]]:
    """Runs `plan` and returns the clean latents `[B, C, ...]` and the seconds each stage took.

    `noises` holds one array a stage, as `sampling.noise.stage_noises` draws them. `progress` hears of every
    step that is done; the next step of the stage has been dispatched by then, so the device does not wait for
    the host. What `progress` raises ends the run. Where two models take turns, `take` gives the parameters
    and the conditioning of the first (False) or of the second (True) when its turn begins, and those given
    are not used. UsageError names the step after which the latents are not all finite numbers.
    """
    # Once, not at each step.
    parameters, second = jax.tree.leaves(parameters), None
    conditioning, latents = programs.target.put((conditioning, noises[0]))
    state, seconds = programs.target.put(programs.solver.init(latents)), []

    def finish(before: jax.Array, latents: jax.Array, stage: int, step: int, *levels: float) -> None:
        # On the host, which has nothing else to do: the device is at the next step.
        after = np.asarray(latents)
        if not np.isfinite(after).all():
            raise UsageError(
                f"the latents are NaN or infinite after stage {stage + 1} of {len(plan.stages)}, step "
                f"{step + 1} of {plan.steps} (σ {levels[0]:.4f} to {levels[1]:.4f}); lower guidance_scale, "
                f"or if others fail too, download the transformer's weights again"
            )
        progress(Step(stage, step, *levels, before, after))

    for number, stage in enumerate(plan.stages):
        begin = time.perf_counter()
        if number:
            levels = np.float32([stage.sigma, stage.kappa, stage.ratio])
            latents, state = programs.transition(latents, state, noises[number], *levels, plan)
        running, evaluated = None, []
        for step, (sigma, next_sigma) in enumerate(pairwise(stage.sigmas), stage.start):
            levels, before = (np.float32(sigma), np.float32(next_sigma)), latents
            if step in stage.skipped:
                latents, state = programs.forecast(latents, state, weights(evaluated, sigma), *levels)
            else:
                if take and (step in stage.second) != second:
                    # What the other works with can go when it has ended.
                    jax.block_until_ready(latents)
                    second, parameters = step in stage.second, None
                    parameters, conditioning = take(second)
                    parameters = jax.tree.leaves(parameters)
                    conditioning = programs.target.put(conditioning)
                latents, state = programs.step(parameters, latents, state, *levels, conditioning)
                evaluated.insert(0, sigma)
            if running:
                finish(*running)
            running = before, latents, number, step, sigma, next_sigma
        finish(*running)
        seconds.append(time.perf_counter() - begin)
    return latents, seconds
