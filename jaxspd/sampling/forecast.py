"""Steps that take a forecast for the model's velocity, which is smooth along a trajectory.

Which steps do is known before the run. A forecast is a weighted sum of the velocities that the model gave
last, and its weights depend on the noise levels alone. So the host makes them beforehand, and one program
serves all such steps of a grid.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxspd.errors import UsageError
from jaxspd.sampling.solver import Solver, State
from jaxspd.spectral.plan import Plan

# The first steps all evaluate the model; then every `WINDOW`-th, and ever fewer (Spectrum, arXiv 2603.01623).
WARM_UP = 5
WINDOW = 2
# Steps that evaluate the model when the grid has grown.
RESTART = 2
# So many velocities a forecast is made of: it is the line through them (TaylorSeer, arXiv 2503.06923, at
# first order), which `bench/forecast.py` finds nearest to the model.
HISTORY = 2


def forecasting_plan(plan: Plan, growth: float | None) -> Plan:
    """`plan`, in which steps are forecast; the intervals between those that are not grow by `growth` with
    each. None forecasts nothing. What was evaluated is forgotten where the grid grows or another model takes
    over, so the first steps then evaluate too. UsageError unless `growth` is a finite number of 0 or more.
    """
    if growth is None:
        return plan
    if not 0 <= growth < math.inf:
        raise UsageError(f"forecast must be a finite number of 0 or more, not {growth:g}")
    due, window, stages = WARM_UP - 1 + WINDOW, WINDOW, []
    for stage in plan.stages:
        skipped, begun = set(), stage.start
        for step in range(stage.start, stage.end):
            if (step in stage.second) != (step - 1 in stage.second):
                begun = step
            if step == due:
                window += growth
                due = step + math.floor(window)
            elif step >= WARM_UP and step - begun >= RESTART:
                skipped.add(step)
        stages.append(replace(stage, skipped=frozenset(skipped)))
    return replace(plan, stages=tuple(stages))


def weights(evaluated: Sequence[float], sigma: float) -> np.ndarray:
    """The share `[HISTORY]`, float32, of each last evaluation in the forecast at noise level `sigma`:
    Lagrange's polynomials through the levels `evaluated`, newest first, of which there is at least one.
    """
    levels = evaluated[:HISTORY]
    shares = np.zeros(HISTORY, np.float32)
    for number, level in enumerate(levels):
        others = [other for other in levels if other != level]
        shares[number] = math.prod((sigma - other) / (level - other) for other in others)
    return shares


class Remembering(NamedTuple):
    """A solver's own state, and the last velocities that the model gave, newest first."""

    solver: State
    velocities: tuple[jax.Array, ...]


def forecasting(solver: Solver) -> Solver:
    """`solver`, whose `forecast(state, latents, weights, sigma, next_sigma)` steps without the model."""

    def init(latents: jax.Array) -> Remembering:
        zero = jnp.zeros(latents.shape, jnp.float32)
        return Remembering(solver.init(latents), (zero,) * HISTORY)

    def step(state: Remembering, latents, velocity, sigma, next_sigma):
        latents, own = solver.step(state.solver, latents, velocity, sigma, next_sigma)
        return latents, Remembering(own, (velocity, *state.velocities[:-1]))

    def forecast(state: Remembering, latents, weights, sigma, next_sigma):
        velocity = sum(share * past for share, past in zip(weights, state.velocities, strict=True))
        latents, own = solver.step(state.solver, latents, velocity, sigma, next_sigma)
        return latents, Remembering(own, state.velocities)

    def grow(state: Remembering, latents, expand, ratio):
        return init(latents)._replace(solver=solver.grow(state.solver, latents, expand, ratio))

    return Solver(init, step, grow, forecast)
