"""Whether scanning over a model's layers costs speed.

    python bench/scanning.py

Of each family's mid-size model, with random weights: seconds of a step on both grids, layers scanned as
jaxspd has them, each layer's weights being copied out of a stack, and layers unrolled, each with weights of
its own. All in turns, in one process; guided models run both passes, as they do.
"""

from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from machine import save
from offload import random_like
from presets import PRESETS, Model
from timing import in_turns

from jaxspd.families import family_class
from jaxspd.families.base import BaseFamily
from jaxspd.params import SamplingParams
from jaxspd.planning import complete, plan_request, reading
from jaxspd.sampling.guidance import Guided, guide
from jaxspd.sampling.programs import Programs
from jaxspd.sampling.solvers import SOLVERS

GROWN = {"progressive_mode": "dct_rewind", "progressive_delta": 0.05}


def unrolled(blocks, carry, *shared):
    """In place of `layers.scan`, for blocks whose parameters are tuples, one entry a layer."""
    if blocks is None:
        return carry
    graph, state = nnx.split(blocks)
    parameters = nnx.to_flat_state(state)
    for layer in range(len(parameters[0][1].get_value())):
        own = [(path, variable.replace(variable.get_value()[layer])) for path, variable in parameters]
        carry = nnx.merge(graph, nnx.from_flat_state(own))(carry, *shared)
    return carry


def split_layers(family: BaseFamily, parameters: nnx.State) -> nnx.State:
    """Stacked parameters as tuples of layers."""
    stacked = {rule.path.split(".")[0] for rule in family.rules if rule.stacked}
    return nnx.from_flat_state(
        [
            (path, variable.replace(tuple(variable.get_value())) if path[0] in stacked else variable)
            for path, variable in nnx.to_flat_state(parameters)
        ]
    )


def steps(model: Model) -> dict[str, float]:
    """Median seconds of a step, by how the layers run and the latents' grid."""
    family = family_class(model.family)()
    known = {field.name for field in fields(family.config)}
    sizes = {name: value for name, value in model.transformer.items() if name in known}
    family = replace(family, config=replace(family.config, **sizes))
    params = complete(family, SamplingParams(**model.request, **GROWN))
    family, plan = reading(family, params), plan_request(family, params)
    velocity, solver = family.velocity_function(jnp.float32), SOLVERS["euler"]
    conditioning = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), family.abstract_conditioning(1))
    if family.guided(params.guidance_scale):
        conditioning = Guided(conditioning, conditioning, jnp.ones(1))
    scanned = jax.tree.map(random_like, family.abstract_parameters(jnp.float32))
    layout = {"scanned": scanned, "unrolled": split_layers(family, scanned)}
    leading, sigma, calls = (1, *family.leading(params.num_frames)), np.float32(0.5), {}
    for kind, parameters in layout.items():
        programs = Programs(guide(velocity, family.combine, batched=True), solver)
        scan = f"{family.transformer.__module__}.scan"
        with patch(scan, unrolled) if kind == "unrolled" else nullcontext():
            programs.prepare(plan, leading, parameters, conditioning)
            programs.wait()
        for stage in plan.stages:
            latents = jnp.ones((*leading, *stage.latent))
            run = partial(
                programs.step, parameters, latents, solver.init(latents), sigma, sigma, conditioning
            )
            grid = "×".join(map(str, stage.latent))
            calls[f"{kind}, {grid}"] = lambda run=run: jax.block_until_ready(run())
    return in_turns(calls)


def main() -> None:
    measured = {model.name: steps(model) for model in PRESETS["cpu"].models if model.family}
    save("scanning", ("jax", "jaxlib", "flax"), {"seconds a step": measured})


if __name__ == "__main__":
    main()
