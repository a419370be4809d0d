"""The interface of a solver of the probability-flow ODE `dx/dσ = v(x, σ)`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

State = Any  # a pytree of arrays
# `expand(latents, sigma, kappa)`: latents at noise level σ on the finer grid, scaled by κ.
Expand = Callable[[jax.Array, Any, Any], jax.Array]


class Solver(NamedTuple):
    """Pure functions, like an optax optimiser's.

    `init(latents) -> state` makes the state before the first step. `step(state, latents, velocity, sigma,
    next_sigma) -> (latents, state)` moves the float32 latents from σ to the next σ. `grow(state, latents,
    expand, ratio) -> state` brings the state of a multistep solver to a finer grid, where `latents` already
    are. `expand` grows an array as the latents grew, and `ratio` is the factor that this put on the clean
    picture. `forecast` steps without a velocity; only solvers from `sampling.forecast` have it.
    """

    init: Callable[[jax.Array], State]
    step: Callable[..., tuple[jax.Array, State]]
    grow: Callable[[State, jax.Array, Expand, jax.Array], State]
    forecast: Callable[..., tuple[jax.Array, State]] | None = None
