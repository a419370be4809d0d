"""What a solver of the probability-flow ODE `dx/dσ = v(x, σ)` is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

State = Any  # a pytree of arrays
# `expand(latents, sigma, kappa)`: latents at noise level σ on the finer grid, scaled by κ.
Expand = Callable[[jax.Array, Any, Any], jax.Array]


class Solver(NamedTuple):
    """Pure functions, like an optax optimiser's.

    `init(latents) -> state` remembers nothing. `step(state, latents, velocity, sigma, next_sigma) ->
    (latents, state)` moves the float32 latents from σ to the next σ. `grow(state, latents, expand, ratio) ->
    state` brings what a multistep solver remembers to a finer grid, on which `latents` are already: `expand`
    grows an array as it grew those, which multiplied a clean picture by `ratio`. Solvers that
    `sampling.forecast` makes can step without a velocity, too: by `forecast`.
    """

    init: Callable[[jax.Array], State]
    step: Callable[..., tuple[jax.Array, State]]
    grow: Callable[[State, jax.Array, Expand, jax.Array], State]
    forecast: Callable[..., tuple[jax.Array, State]] | None = None
