"""Steps that use a forecast in place of the model's velocity, which changes smoothly along a trajectory.

The plan says before the run which steps are forecast. A forecast is a weighted sum of the model's last
velocities, and the weights depend on the noise levels alone. So the host computes the weights, and one
program serves all forecast steps of a grid.
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

# The first `WARM_UP` steps evaluate the model. Then every `WINDOW`-th does, and the interval grows (Spectrum,
# arXiv 2603.01623).
WARM_UP = 5
WINDOW = 2
# How many steps evaluate the model after the grid has grown or another model has taken over.
RESTART = 2
# How many velocities a forecast is made of. It is the line through two (TaylorSeer, arXiv 2503.06923, at
# first order), which `bench/forecast.py` finds nearest to the model.
HISTORY = 2


def forecasting_plan(plan: Plan, growth: float | None) -> Plan:
    """`plan` with the steps marked that are forecast, or as it is if `growth` is None.

    The interval between evaluations grows by `growth` steps after each evaluation. Earlier velocities are
    forgotten where the grid grows or another model takes over, so the first steps after that evaluate too.
    Raises UsageError unless `growth` is a finite number of 0 or more.
    """
    if growth is None:
        return plan
    if not 0 <= growth < math.inf:
        raise UsageError(f"forecast must be a finite number of 0 or more, not {growth:g}")
    window: float = WINDOW
    due, stages = WARM_UP - 1 + WINDOW, []
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
    """The weights `[HISTORY]`, float32, of the last velocities in the forecast at noise level `sigma`.

    They are Lagrange's polynomials through the levels `evaluated`, newest first, at least one.
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
    """`solver` with a `forecast(state, latents, weights, sigma, next_sigma)`, a step without the model."""

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
