"""Forecasting: which steps evaluate the model, and what the others take for it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspd.cli import main
from jaxspd.errors import UsageError
from jaxspd.sampling.forecast import forecasting, forecasting_plan, weights
from jaxspd.sampling.loop import denoise
from jaxspd.sampling.programs import Programs
from jaxspd.sampling.solvers import SOLVERS
from jaxspd.spectral.levels import halvings
from jaxspd.spectral.spectrum import Spectrum
from tests.plans import plan_of

SPECTRUM = Spectrum(20.0, 3.0)


def plan_over(steps, levels=0, grid=(8, 8)):
    mode = "dct_rewind" if levels else "fullres"
    sigmas = np.linspace(1, 0, steps + 1)
    return plan_of(
        halvings(grid, levels), sigmas, SPECTRUM, mode=mode, delta=0.1, tokens=lambda g: g[0] * g[1]
    )


@pytest.mark.parametrize(
    ("growth", "evaluated"),
    [
        (0.75, [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46]),
        (3, [0, 1, 2, 3, 4, 6, 11, 19, 30, 44]),
        (0, [*range(5), *range(6, 50, 2)]),
    ],
)
def test_the_published_schedule(growth, evaluated):
    plan = forecasting_plan(plan_over(50), growth)
    assert plan.stages[0].evaluated == evaluated
    assert plan.forwards == len(evaluated)
    assert plan.flop_speedup(float) == pytest.approx(50 / len(evaluated))


def test_a_new_stage_begins_with_evaluations_and_the_intervals_grow_on():
    plan = forecasting_plan(plan_over(50, levels=1), 0.75)
    coarse, fine = plan.stages
    assert coarse.evaluated == [s for s in [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38] if s < coarse.end]
    published = [s for s in [6, 8, 11, 15, 20, 25, 31, 38, 46] if s > fine.start + 1]
    assert fine.evaluated == [fine.start, fine.start + 1, *published]
    costs = {stage.tokens: len(stage.evaluated) * stage.tokens for stage in plan.stages}
    assert plan.token_step_ratio() == pytest.approx(sum(costs.values()) / (50 * fine.tokens))


@pytest.mark.parametrize("growth", [-1, np.inf, np.nan])
def test_growth_is_a_finite_number(growth):
    with pytest.raises(UsageError, match="forecast must be a finite number of 0 or more"):
        forecasting_plan(plan_over(50), growth)


def test_a_line_is_forecast_exactly():
    slope, levels = lambda sigma: 3 - 2 * sigma, [0.5, 0.7]
    assert weights(levels, 0.2) @ [slope(level) for level in levels] == pytest.approx(slope(0.2), rel=1e-6)
    np.testing.assert_array_equal(weights([0.5], 0.2), [1, 0])


def run(solver, plan, velocity):
    made = Programs(velocity, solver)
    made.prepare(plan, (1, 2), np.float32(1), np.float32(0))
    noises = made.noises(plan, [3], (2,))
    latents, _ = denoise(made, plan, np.float32(1), np.float32(0), noises)
    return np.asarray(latents)


@pytest.mark.parametrize("name", ["euler", "unipc"])
@pytest.mark.parametrize("levels", [0, 2])
def test_where_the_velocity_is_linear_nothing_is_lost(name, levels):
    """And the model is not called for what is forecast: its velocity would be NaN there."""
    plain = plan_over(40, levels, grid=(16, 16))
    plan = forecasting_plan(plain, 0.75)
    skipped = [stage.sigmas[step - stage.start] for stage in plan.stages for step in stage.skipped]
    assert len(skipped) > 15

    def linear(parameters, latents, sigma, conditioning):
        return 0 * latents + 3 - 2 * sigma

    def nan_where_skipped(parameters, latents, sigma, conditioning):
        near = jnp.abs(jnp.asarray(skipped) - sigma).min() < 1e-6
        return jnp.where(near, jnp.nan, linear(parameters, latents, sigma, conditioning))

    ours = run(forecasting(SOLVERS[name]), plan, nan_where_skipped)
    np.testing.assert_allclose(ours, run(SOLVERS[name], plain, linear), rtol=1e-4, atol=1e-4)


def test_plan_tells_which_steps_evaluate_the_model(capsys):
    flags = ["plan", "--family", "flux1", "--num-inference-steps", "50", "--forecast", "3"]
    assert main([*flags, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["steps"], plan["forwards"]) == (50, 10)
    assert plan["stages"][0]["evaluated"] == [0, 1, 2, 3, 4, 6, 11, 19, 30, 44]
    assert plan["flop_speedup"] == pytest.approx(5)
    assert main(flags) == 0
    assert "10 of 50 steps evaluate the model: 0, 1, 2, 3, 4, 6, 11, 19, 30, 44" in capsys.readouterr().out


def test_a_bad_growth_is_refused_in_a_line(capsys):
    assert main(["plan", "--family", "flux1", "--forecast", "-1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
