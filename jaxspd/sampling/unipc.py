"""UniPC, second order: a multistep predictor and a corrector that costs no further model call.

Source: UniPC (arXiv 2302.04867), the B(h) version with B₂(h) = e^{-h} - 1 and the data prediction
`x_0 = x - σ·v`, on flow matching's `α = 1 - σ`. λ = log(α/σ) is half the log signal-to-noise ratio, and
h the difference of λ over a step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxspd.sampling.solver import Expand, Solver
from jaxspd.spectral.plan import alignment

# λ is infinite where the picture is pure noise; the official schedules start this far from it.
SMALLEST_ALPHA = 1e-6


class History(NamedTuple):
    """What is remembered of the last two steps, newest first: `count` steps are known (0, 1, or 2 for more),
    from `latents` at `sigmas`, where the model predicted `clean`.
    """

    count: jax.Array
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
    """UniP: latents at `next_sigma`. First order without history, and at σ = 0, where h is infinite."""
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

    It repeats the step that led here, so its order is that step's: 1 for a stage's first, else 2.
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
    # The weights ρ solve ρ_1 + ρ_2 = b_1 and r·ρ_1 + ρ_2 = b_2; at first order ρ_2 is 1/2.
    rho_before = jnp.where(multistep, (first - second) / (1 - ratio), 0.0)
    rho_here = jnp.where(multistep, first - rho_before, 0.5)
    estimate = previous + rho_before / ratio * (before - previous) + rho_here * (clean - previous)
    return sigma / history.sigmas[0] * history.latents - (1 - sigma) * shrink * estimate


def _grow(history: History, latents, expand: Expand, ratio) -> History:
    """`history` as if its steps had been made on the finer grid.

    Each noise level is aligned as that at which the grid grows (arXiv 2605.18736), so that grown latents lie
    on the finer grid's own trajectory. Of a clean prediction the finer frequencies are not known: they are 0.
    """
    kappas = [alignment(ratio, sigma) for sigma in history.sigmas]
    return History(
        count=history.count,
        latents=expand(history.latents, history.sigmas[0], kappas[0]),
        clean=tuple(expand(clean, 0.0, ratio) for clean in history.clean),
        sigmas=tuple(kappa * sigma for kappa, sigma in zip(kappas, history.sigmas, strict=True)),
    )


unipc = Solver(init=_init, step=_step, grow=_grow)
