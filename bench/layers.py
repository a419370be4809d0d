"""Compares running a model layer by layer with other ways.

    python bench/layers.py

The seconds of a step are measured on both grids for each family's mid-size model, with random weights. One
program serves every layer, as in jaxspd; or the whole step is one program, in which the layers are unrolled,
or a scan over stacked layers. All run in turns, in one process. Guided models run both passes.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
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

from jaxspd.families.base import BaseFamily
from jaxspd.planning import plan_request, reading
from jaxspd.request import SamplingParams
from jaxspd.resolving import resolve
from jaxspd.runtime.backend import start_backend
from jaxspd.runtime.layerwise import Layerwise
from jaxspd.sampling.guidance import Guided, guide
from jaxspd.sampling.programs import SCALAR
from jaxspd.sampling.solvers import SOLVERS

GROWN = {"progressive_mode": "dct_rewind", "progressive_delta": 0.05}
WAYS = ("layer by layer", "unrolled", "scanned")


def scan(blocks: nnx.Module, carry, *shared):
    """Replaces `layers.layer`: runs each layer of a block whose parameters have a leading layer axis."""
    graph, stacked = nnx.split(blocks)
    return jax.lax.scan(lambda carry, own: (nnx.merge(graph, own)(carry, *shared), None), carry, stacked)[0]


def stacked(parameters: nnx.State) -> nnx.State:
    """`parameters` with those of a row's layers stacked into one array each."""
    joined = defaultdict(list)
    for path, parameter in nnx.to_flat_state(parameters):
        joined[tuple(0 if isinstance(part, int) else part for part in path)].append(parameter)
    return nnx.from_flat_state(
        [
            (path, own[0].replace(jnp.stack([p.get_value() for p in own])) if 0 in path else own[0])
            for path, own in joined.items()
        ]
    )


def with_one_layer(model: nnx.Module) -> nnx.Module:
    """`model` with only the first block of each row, to hold parameters from `stacked`."""
    for name, row in vars(model).items():
        if isinstance(row, nnx.List):
            setattr(model, name, nnx.List(row[:1]))
    return model


@contextmanager
def running(way: str, family: BaseFamily) -> Iterator[None]:
    """A context in which the family's models are made and run in that `way`."""
    if way != "scanned":
        yield
        return
    module, make = family.transformer.__module__, family.transformer
    with (
        patch.object(type(family), "transformer", lambda *a, **options: with_one_layer(make(*a, **options))),
        patch(f"{module}.layer", scan),
    ):
        yield


def compiled_step(way: str, velocity, parameters, latents, conditioning):
    """The program of an Euler step, `(parameters, latents, σ, next σ, conditioning) -> latents`."""

    def step(parameters, latents, sigma, next_sigma, conditioning):
        v = velocity(parameters, latents, sigma, conditioning)
        return SOLVERS["euler"].step((), latents, v, sigma, next_sigma)[0]

    arguments = parameters, latents, SCALAR, SCALAR, conditioning
    if way == "layer by layer":
        return Layerwise(step, *arguments)
    return jax.jit(step).lower(*arguments).compile()


def steps(model: Model) -> dict[str, float]:
    """The median seconds of a step, by the way in which the layers run and the latents' grid."""
    family = model.recipe()
    params = resolve(family, SamplingParams(**model.request, **GROWN))
    family, plan = reading(family, params), plan_request(family, params)
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
                velocity = guide(family.velocity_function(jnp.float32), family.combine, batched=True)
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
