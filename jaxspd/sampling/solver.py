"""What a solver of the probability-flow ODE `dx/dσ = v(x, σ)` is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

State = Any  # a pytree of arrays


class Solver(NamedTuple):
    """A pure pair, like an optax optimiser.

    `init(latents) -> state` starts a stage: whatever a multistep solver remembers is forgotten when
    the grid changes. `step(state, latents, velocity, sigma, next_sigma) -> (latents, state)` moves the
    float32 latents from σ to the next σ. Solvers that `sampling.forecast` makes can do so without a velocity,
    too: by `forecast`.
    """

    init: Callable[[jax.Array], State]
    step: Callable[..., tuple[jax.Array, State]]
    forecast: Callable[..., tuple[jax.Array, State]] | None = None
