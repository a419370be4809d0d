"""UniPC, second order: a multistep predictor and a corrector that costs no further model call.

Source: UniPC (arXiv 2302.04867), the B(h) version with B₂(h) = e^{-h} - 1 and the data prediction
`x_0 = x - σ·v`, on flow matching's `α = 1 - σ`. λ = log(α/σ) is half the log signal-to-noise ratio, and h is
the difference of λ over a step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxspd.sampling.solver import Expand, Solver
from jaxspd.spectral.plan import alignment

# λ is infinite where the picture is pure noise; the official schedules start this far from it.
SMALLEST_ALPHA = 1e-6


class History(NamedTuple):
    """The last two evaluations, newest first.

    `count` is how many there are (0, 1, or 2 for more). At the noise levels `sigmas` the model predicted
    `clean`. `latents` are the corrected latents at the newest.
    """

    count: jax.Array  # type: ignore[assignment]  # hides the tuple's method, which nobody calls
    latents: jax.Array
    clean: tuple[jax.Array, jax.Array]
    sigmas: tuple[jax.Array, jax.Array]


def _init(latents: jax.Array) -> History:
    def zero():
        return jnp.zeros(latents.shape, jnp.float32)

    scalars = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
    return History(jnp.zeros((), jnp.int32), zero(), (zero(), zero()), scalars)


def _log_snr(sigma: jax.Array) -> jax.Array:
    """λ(σ)."""
    return jnp.log(jnp.maximum(1 - sigma, SMALLEST_ALPHA)) - jnp.log(sigma)


def _step(history: History, latents, velocity, sigma, next_sigma):
    clean = latents - sigma * velocity
    latents = jnp.where(history.count == 0, latents, _correct(history, clean, sigma))
    latents_next = _predict(history, latents, clean, sigma, next_sigma)
    return latents_next, History(
        count=jnp.minimum(history.count + 1, 2),
        latents=latents,
        clean=(clean, history.clean[0]),
        sigmas=(sigma, history.sigmas[0]),
    )


def _predict(history: History, latents, clean, sigma, next_sigma):
    """UniP: latents at `next_sigma`, second order.

    It is first order without history, and for the step to σ = 0, where h is infinite.
    """
    step = _log_snr(next_sigma) - _log_snr(sigma)
    shrink = jnp.expm1(-step)
    second = (history.count > 0) & (next_sigma > 0)
    ratio = jnp.where(second, (_log_snr(history.sigmas[0]) - _log_snr(sigma)) / step, 1.0)
    slope = jnp.where(second, 0.5 / ratio, 0.0)
    # The first difference of `clean` weighs 1/2 at second order, whatever the step.
    estimate = clean + slope * (history.clean[0] - clean)
    return next_sigma / sigma * latents - (1 - next_sigma) * shrink * estimate


def _correct(history: History, clean, sigma):
    """UniC: the latents at σ once more, now that the model has seen them and predicted `clean`.

    It repeats the step that led here and has that step's order: 1 for a stage's first step, else 2.
    """
    previous, before = history.clean
    start = _log_snr(history.sigmas[0])
    step = _log_snr(sigma) - start
    shrink = jnp.expm1(-step)
    # Moments b_1, b_2 of the exponential integrator over the step (equation 5 and appendix A).
    phi = -shrink / step - 1
    first = phi / shrink
    second = 2 * (-phi / step - 0.5) / shrink
    multistep = history.count > 1
    ratio = jnp.where(multistep, (_log_snr(history.sigmas[1]) - start) / step, -1.0)
    # The weights ρ solve ρ_1 + ρ_2 = b_1 and r·ρ_1 + ρ_2 = b_2. At first order ρ_2 is 1/2.
    rho_before = jnp.where(multistep, (first - second) / (1 - ratio), 0.0)
    rho_here = jnp.where(multistep, first - rho_before, 0.5)
    estimate = previous + rho_before / ratio * (before - previous) + rho_here * (clean - previous)
    return sigma / history.sigmas[0] * history.latents - (1 - sigma) * shrink * estimate


def _grow(history: History, latents, expand: Expand, ratio) -> History:
    """`history` as if its steps had been made on the finer grid.

    Each noise level is aligned in the same way as the level at which the grid grows (arXiv 2605.18736), so
    that the grown latents lie on the finer grid's own trajectory. The finer frequencies of a clean prediction
    are unknown and set to 0.
    """
    newest, older = (alignment(ratio, sigma) for sigma in history.sigmas)
    return History(
        count=history.count,
        latents=expand(history.latents, history.sigmas[0], newest),
        clean=(expand(history.clean[0], 0.0, ratio), expand(history.clean[1], 0.0, ratio)),
        sigmas=(newest * history.sigmas[0], older * history.sigmas[1]),
    )


unipc = Solver(init=_init, step=_step, grow=_grow)
