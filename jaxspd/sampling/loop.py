"""The staged denoising loop."""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
import numpy as np

from jaxspd.errors import UsageError
from jaxspd.runtime.memory import memory_for
from jaxspd.sampling.forecast import weights
from jaxspd.sampling.programs import Programs
from jaxspd.spectral.plan import Plan

Progress = Callable[[int, int, float], None]


@memory_for("denoising")
def denoise(
    programs: Programs,
    plan: Plan,
    parameters,
    conditioning,
    noises: Sequence[np.ndarray],
    progress: Progress = lambda stage, step, sigma: None,
) -> tuple[jax.Array, list[float]]:
    """Runs `plan` and returns the clean latents `[B, C, ...]` and the seconds each stage took.

    `noises` holds one array a stage, as `sampling.noise.stage_noises` draws them. When a step is done,
    `progress` hears the stage's and the step's number (from 0) and the σ reached; the next step of the stage
    has been dispatched by then, so the device does not wait for the host. UsageError names the step after
    which the latents are not all finite numbers.
    """
    # Once, not at each step.
    parameters = jax.tree.leaves(parameters)
    conditioning, latents = jax.device_put((conditioning, noises[0]))
    seconds = []

    def finish(latents: jax.Array, stage: int, step: int, sigma: float, next_sigma: float) -> None:
        # On the host, which has nothing else to do: the device is at the next step.
        if not np.isfinite(np.asarray(latents)).all():
            raise UsageError(
                f"the latents are NaN or infinite after stage {stage + 1} of {len(plan.stages)}, step "
                f"{step + 1} of {plan.steps} (σ {sigma:.4f} to {next_sigma:.4f}); lower guidance_scale, or "
                f"if others fail too, download the transformer's weights again"
            )
        progress(stage, step, next_sigma)

    for number, stage in enumerate(plan.stages):
        begin = time.perf_counter()
        if number:
            latents = programs.transition(
                latents, noises[number], np.float32(stage.sigma), np.float32(stage.kappa), plan.transform
            )
        state, running, evaluated = programs.solver.init(latents), None, []
        for step, (sigma, next_sigma) in enumerate(pairwise(stage.sigmas), stage.start):
            levels = np.float32(sigma), np.float32(next_sigma)
            if step in stage.skipped:
                latents, state = programs.forecast(latents, state, weights(evaluated, sigma), *levels)
            else:
                latents, state = programs.step(parameters, latents, state, *levels, conditioning)
                evaluated.insert(0, sigma)
            if running:
                finish(*running)
            running = latents, number, step, sigma, next_sigma
        finish(*running)
        seconds.append(time.perf_counter() - begin)
    return latents, seconds
