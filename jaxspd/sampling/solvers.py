"""Solvers of the probability-flow ODE `dx/dσ = v(x, σ)`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

State = Any  # a pytree of arrays


class Solver(NamedTuple):
    """A pure pair, like an optax optimiser.

    `init(latents) -> state` starts a stage: whatever a multistep solver remembers is forgotten when
    the grid changes. `step(state, latents, velocity, sigma, next_sigma) -> (latents, state)` moves the
    float32 latents from σ to the next σ.
    """

    init: Callable[[jax.Array], State]
    step: Callable[..., tuple[jax.Array, State]]


def _euler_step(state, latents, velocity, sigma, next_sigma):
    return latents + (next_sigma - sigma) * velocity, state


euler = Solver(init=lambda latents: (), step=_euler_step)
"""Euler's method, first order: `x_{i+1} = x_i + (σ_{i+1} - σ_i)·v_i`."""
