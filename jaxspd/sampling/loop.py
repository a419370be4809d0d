"""The staged denoising loop."""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
import numpy as np

from jaxspd.sampling.programs import Programs
from jaxspd.spectral.plan import Plan

Progress = Callable[[int, int, float], None]


def denoise(
    programs: Programs,
    plan: Plan,
    parameters,
    conditioning,
    noises: Sequence[np.ndarray],
    progress: Progress = lambda stage, step, sigma: None,
) -> tuple[jax.Array, list[float]]:
    """Runs `plan` and returns the clean latents `[B, C, ...]` and the seconds each stage took.

    `noises` holds one array a stage, as `sampling.noise.stage_noises` draws them. After each step
    `progress` hears the stage's and the step's number (from 0) and the σ reached.
    """
    conditioning = jax.device_put(conditioning)  # once, not at each step
    # A copy: the CPU backend may share a NumPy array, and the buffer is donated.
    latents, seconds = jax.numpy.array(noises[0]), []
    for number, stage in enumerate(plan.stages):
        begin = time.perf_counter()
        if number:
            latents = programs.transition(
                latents, noises[number], np.float32(stage.sigma), np.float32(stage.kappa), plan.transform
            )
        state = programs.solver.init(latents)
        for step, (sigma, next_sigma) in enumerate(pairwise(stage.sigmas), stage.start):
            latents, state = programs.step(
                parameters, latents, state, np.float32(sigma), np.float32(next_sigma), conditioning
            )
            latents.block_until_ready()  # so that the progress shown is work done
            progress(number, step, next_sigma)
        seconds.append(time.perf_counter() - begin)
    return latents, seconds
