"""What running a model layer by layer is worth.

    python bench/layers.py

Of each family's mid-size model, with random weights: seconds of a step on both grids, with a program that
serves every layer, as jaxspd has it; with the whole step as one program, layers unrolled in it; and with one
that scans over stacked layers. All in turns, in one process; guided models run both passes, as they do.
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
from jaxspd.runtime.backend import start_backend
from jaxspd.runtime.layerwise import Layerwise
from jaxspd.sampling.guidance import Guided, guide
from jaxspd.sampling.programs import SCALAR
from jaxspd.sampling.solvers import SOLVERS

GROWN = {"progressive_mode": "dct_rewind", "progressive_delta": 0.05}
WAYS = ("layer by layer", "unrolled", "scanned")


def scan(blocks, carry, *shared):
    """In place of `layers.run`, for blocks whose parameters have a leading layer axis."""
    if blocks is None:
        return carry
    graph, stacked = nnx.split(blocks)
    return jax.lax.scan(lambda carry, own: (nnx.merge(graph, own)(carry, *shared), None), carry, stacked)[0]


def stacked(parameters: nnx.State) -> nnx.State:
    """Parameters of layers as one array each."""

    def joined(value):
        return jnp.stack(value) if isinstance(value, tuple) else value

    return nnx.from_flat_state(
        [(path, p.replace(joined(p.get_value()))) for path, p in nnx.to_flat_state(parameters)]
    )


def running(way: str, family: BaseFamily):
    """A context in which the family's models run their layers that way."""
    return patch(f"{family.transformer.__module__}.run", scan) if way == "scanned" else nullcontext()


def compiled_step(way: str, velocity, parameters, latents, conditioning):
    """An Euler step's program, `(parameters, latents, σ, next σ, conditioning)` to latents."""

    def step(parameters, latents, sigma, next_sigma, conditioning):
        v = velocity(parameters, latents, sigma, conditioning)
        return SOLVERS["euler"].step((), latents, v, sigma, next_sigma)[0]

    arguments = parameters, latents, SCALAR, SCALAR, conditioning
    if way == "layer by layer":
        return Layerwise(step, *arguments)
    return jax.jit(step).lower(*arguments).compile()


def steps(model: Model) -> dict[str, float]:
    """Median seconds of a step, by how the layers run and the latents' grid."""
    family = family_class(model.family)()
    known = {field.name for field in fields(family.config)}
    sizes = {name: value for name, value in model.transformer.items() if name in known}
    family = replace(family, config=replace(family.config, **sizes))
    params = complete(family, SamplingParams(**model.request, **GROWN))
    family, plan = reading(family, params), plan_request(family, params)
    velocity = guide(family.velocity_function(jnp.float32), family.combine, batched=True)
    conditioning = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), family.abstract_conditioning(1))
    if family.guided(params.guidance_scale):
        conditioning = Guided(conditioning, conditioning, jnp.ones(1))
    alone = jax.tree.map(random_like, family.abstract_parameters(jnp.float32))
    weights = dict.fromkeys(WAYS, alone) | {"scanned": stacked(alone)}
    leading, sigma, calls = (1, *family.leading(params.num_frames)), np.float32(0.5), {}
    for stage in plan.stages:
        latents = jnp.ones((*leading, *stage.latent))
        grid = "×".join(map(str, stage.latent))
        for way in WAYS:
            with running(way, family):
                program = compiled_step(way, velocity, weights[way], latents, conditioning)
            run = partial(program, weights[way], latents, sigma, sigma, conditioning)
            calls[f"{way}, {grid}"] = lambda run=run: run().block_until_ready()
    return in_turns(calls)


def main() -> None:
    start_backend()
    measured = {model.name: steps(model) for model in PRESETS["cpu"].models if model.family}
    save("layers", ("jax", "jaxlib", "flax"), {"seconds a step": measured})


if __name__ == "__main__":
    main()
