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
    """A finished step, from noise level `sigma` to `reached`.

    `stage` and `number` count from 0; `number` counts the steps of all stages. `before` and `after` are the
    latents `[B, C, ...]` at the two levels.
    """

    stage: int
    number: int
    sigma: float
    reached: float
    before: jax.Array
    after: np.ndarray

    def clean(self) -> np.ndarray:
        """Clean latents, float32: the end at σ = 0 of the straight line through `before` and `after`.

        For an Euler step this is the model's own prediction, `x - σ·v`.
        """
        if self.reached == self.sigma:  # two equal points define no line
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

    `noises` holds one array `[B, C, ...]` for each stage, as `sampling.noise.stage_noises` draws them.
    `progress` is called with every finished step. By then the stage's next step has been dispatched, so the
    device does not wait for the host. An exception from `progress` ends the run.

    Where two models take turns, `take` is called when a turn begins, with False for the first model and True
    for the second. It returns that model's parameters and conditioning, and those passed here are not used.

    Raises UsageError, which names the step, if latents are not finite.
    """
    # Flattened once, not at each step.
    parameters, second = jax.tree.leaves(parameters), None
    conditioning, latents = programs.target.put((conditioning, noises[0]))
    state, seconds = programs.target.put(programs.solver.init(latents)), []

    def finish(
        before: jax.Array, latents: jax.Array, stage: int, step: int, sigma: float, reached: float
    ) -> None:
        # The host checks this while the device computes the next step.
        after = np.asarray(latents)
        if not np.isfinite(after).all():
            raise UsageError(
                f"the latents are NaN or infinite after stage {stage + 1} of {len(plan.stages)}, step "
                f"{step + 1} of {plan.steps} (σ {sigma:.4f} to {reached:.4f}); lower guidance_scale; "
                f"if other requests fail too, download the transformer's weights again"
            )
        progress(Step(stage, step, sigma, reached, before, after))

    for number, stage in enumerate(plan.stages):
        begin = time.perf_counter()
        if number:
            level, kappa, ratio = np.array([stage.sigma, stage.kappa, stage.ratio], np.float32)
            latents, state = programs.transition(latents, state, noises[number], level, kappa, ratio, plan)
        running: Any = None  # the arguments of `finish` for the step that is on its way
        evaluated: list[float] = []
        for step, (sigma, next_sigma) in enumerate(pairwise(stage.sigmas), stage.start):
            levels, before = (np.float32(sigma), np.float32(next_sigma)), latents
            if step in stage.skipped:
                latents, state = programs.forecast(latents, state, weights(evaluated, sigma), *levels)
            else:
                if take and (step in stage.second) != second:
                    # The other model's parameters can be freed only after its last step.
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
