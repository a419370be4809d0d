"""Euler's method, first order."""

from jaxspd.sampling.solver import Solver


def _step(state, latents, velocity, sigma, next_sigma):
    return latents + (next_sigma - sigma) * velocity, state


euler = Solver(init=lambda latents: (), step=_step, grow=lambda state, latents, expand, ratio: state)
"""`x_{i+1} = x_i + (σ_{i+1} - σ_i)·v_i`."""
