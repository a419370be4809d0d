"""Measures how near several forecasts of the velocity come to the model, on the demo.

    python bench/forecast.py

Final latents of six prompts are compared with those of 200 Euler steps with the same noise. The figure is
PSNR in dB, whose peak is the range of the latter. The rivals are the model at every step; lines and parabolas
through the last velocities (finite differences, TaylorSeer, arXiv 2503.06923); Chebyshev polynomials of
degree 4, fitted by ridge regression to all velocities of the stage; and the mean of these and the line
(Spectrum, arXiv 2603.01623). Each runs with and without growth of the grid.
"""

from collections.abc import Callable, Sequence
from unittest.mock import patch

import jax.numpy as jnp
import numpy as np
from machine import save
from sampling import Demo

from jaxspd.planning import plan_request
from jaxspd.request import SamplingParams
from jaxspd.runtime.backend import start_backend
from jaxspd.sampling import forecast, loop, programs
from jaxspd.sampling.forecast import forecasting
from jaxspd.sampling.programs import Programs
from jaxspd.sampling.solvers import SOLVERS

PROMPTS, STEPS = 6, 50
HISTORY = 16  # enough for every evaluation of a stage
DEGREE, RIDGE = 4, 0.1  # Spectrum's values
GROWN = {"progressive_mode": "dct_rewind", "progressive_delta": 0.05}
Weights = Callable[[Sequence[float], float], np.ndarray]


def polynomial(order: int) -> Weights:
    """The weights of a polynomial through the last `order` + 1 velocities."""

    return lambda evaluated, sigma: forecast.weights(evaluated[: order + 1], sigma)


def chebyshev(evaluated: Sequence[float], sigma: float) -> np.ndarray:
    """The weights of a fit of Chebyshev polynomials. σ from 0 to 1 is their argument from -1 to 1."""
    basis = np.polynomial.chebyshev.chebvander(2 * np.array(evaluated) - 1, DEGREE)
    here = np.polynomial.chebyshev.chebvander([2 * sigma - 1], DEGREE)[0]
    shares = here @ np.linalg.solve(basis.T @ basis + RIDGE * np.eye(DEGREE + 1), basis.T)
    return np.pad(shares, (0, HISTORY - len(evaluated))).astype(np.float32)


def mixed(evaluated: Sequence[float], sigma: float) -> np.ndarray:
    return (chebyshev(evaluated, sigma) + polynomial(1)(evaluated, sigma)) / 2


WAYS = {
    "the last": polynomial(0),
    "line": polynomial(1),
    "parabola": polynomial(2),
    "Chebyshev": chebyshev,
    "Chebyshev and line": mixed,
}


class Trial:
    """Makes latents of the demo's first prompts, by any plan, and compares them with the truth."""

    def __init__(self):
        self.demo = Demo(PROMPTS)
        expansion = self.demo.family.expansions["latent"]
        self.programs = {
            name: Programs(self.demo.velocity, forecasting(solver), expansion=expansion)
            for name, solver in SOLVERS.items()
        }
        self.truth = self.latents(self.plan("euler", 200), "euler")

    def plan(self, scheduler: str, steps: int, **settings):
        params = SamplingParams(num_inference_steps=steps, scheduler=scheduler, **settings)
        return plan_request(self.demo.family, params)

    def latents(self, plan, scheduler: str, weights: Weights = WAYS["line"]) -> np.ndarray:
        with (
            patch.object(forecast, "HISTORY", HISTORY),
            patch.object(programs, "HISTORY", HISTORY),
            patch.object(loop, "weights", weights),
        ):
            return self.demo.latents(self.programs[scheduler], plan, range(PROMPTS))

    def psnr(self, latents: np.ndarray) -> float:
        error = jnp.square(latents - self.truth).mean()
        return round(float(10 * np.log10(np.ptp(self.truth) ** 2 / error)), 1)


def main() -> None:
    start_backend()
    trial, report = Trial(), {}
    for grown, growth in (("full resolution", {}), ("δ 0.05", GROWN)):
        for scheduler in SOLVERS:
            rows = report[f"{grown}, {scheduler}"] = {}
            for steps in (STEPS, 28, 20, 14, 10):
                plan = trial.plan(scheduler, steps, **growth)
                rows[f"{steps} steps"] = trial.psnr(trial.latents(plan, scheduler))
            for asked in (0.75, 3.0):
                plan = trial.plan(scheduler, STEPS, forecast=asked, **growth)
                for way, weights in WAYS.items():
                    name = f"{STEPS} steps, {plan.forwards} forwards, {way}"
                    rows[name] = trial.psnr(trial.latents(plan, scheduler, weights))
            print(f"{grown}, {scheduler}", *(f"  {k}: {v}" for k, v in rows.items()), sep="\n", flush=True)
    save("forecast", ("jax", "jaxlib"), {"PSNR, dB": report})


if __name__ == "__main__":
    main()
