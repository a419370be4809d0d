"""Measures how long the host takes to start a layer's program, and estimates how long a GPU runs it.

    python bench/dispatch.py

The model is a FLUX.1 with all its 57 layers, each tiny. The figures are microseconds per layer until a step
is dispatched. An accelerator computes the step in the meantime. A CPU computes small programs before the call
returns. So on a CPU each layer's program is replaced by one that takes the same arrays and only adds one to
them. The whole step as one program, called with the same arguments, is measured for comparison.

For each official model, a card's microseconds per layer are estimated at a share of the card's peak, on the
model's published grid and on those of one and two levels. If they are fewer than the host's, the card would
wait.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import jax
import jax.numpy as jnp
from flax import nnx
from machine import save
from offload import random_like
from presets import OFFICIAL

from jaxspd.families.flux1 import Family
from jaxspd.models.flux1 import Flux1Config
from jaxspd.planning import grids
from jaxspd.request import SamplingParams
from jaxspd.resolving import resolve
from jaxspd.runtime.backend import start_backend
from jaxspd.runtime.layerwise import Layerwise

CALLS = 200
# The makers' FLOP/s for dense bfloat16 products with sums in float32, and the share of them that is reached.
CARDS, REACHED = {"RTX A6000": 154.8e12, "H100 SXM": 989.4e12}, 0.6
TINY = {
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
    "axes_dims_rope": (4, 6, 6),
}


def idle(step: Layerwise, arguments: tuple) -> None:
    """Replaces the programs of `step` by ones that take the same arrays and compute next to nothing."""
    values, programs = [*jax.tree.leaves(arguments), *step._rest], {}
    for number, piece in enumerate(step._pieces):
        inputs = piece.take(values)
        values[piece.outputs] = outputs = piece.program(*inputs)
        # Programs between layers make arrays of other shapes. They stay, since they compute little.
        sources = [next((n for n, a in enumerate(inputs) if a.shape == out.shape), None) for out in outputs]
        if None in sources:
            continue
        if piece.program not in programs:

            def add_one(*arrays, sources=sources):
                return [arrays[source] + 1 for source in sources]

            programs[piece.program] = jax.jit(add_one, keep_unused=True).lower(*inputs).compile()
        step._pieces[number] = replace(piece, program=programs[piece.program])


def microseconds(call: Callable[[], jax.Array]) -> dict[str, float]:
    """The median and the least time until `call` returns. Its computation ends before the next call."""
    taken = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        result = call()
        taken.append(1e6 * (time.perf_counter() - begin))
        result.block_until_ready()
    return {"median": median(taken), "least": min(taken)}


def on_paper() -> dict[str, dict[str, dict[str, int]]]:
    """The microseconds per layer, by model, grid and card, from the FLOPs of a step."""
    found = {}
    for model in OFFICIAL:
        family = model.recipe()
        asked = SamplingParams(**model.request, progressive_mode="dct_rewind", progressive_levels=2)
        params = resolve(family, asked)
        transformer = family.abstract_transformer(jnp.bfloat16)
        layers = sum(len(row) for row in vars(transformer).values() if isinstance(row, nnx.List))
        passes, rows = 2 if family.guided(params.guidance_scale) else 1, {}
        for level in grids(family, params):
            shape = (*family.leading(params.num_frames), *level.latent)
            flops = passes * family.forward_flops(family.tokens(shape)) / layers
            rows["×".join(map(str, level.latent))] = {
                card: round(1e6 * flops / (REACHED * peak)) for card, peak in CARDS.items()
            }
        found[model.name] = rows
    return found


def main() -> None:
    start_backend()
    family = replace(Family(config=Flux1Config(**TINY)), text_tokens=8)
    parameters = nnx.to_pure_dict(jax.tree.map(random_like, family.abstract_parameters(jnp.float32)))
    conditioning = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), family.abstract_conditioning(1))
    given = parameters, jnp.ones((1, 16, 8, 8)), jnp.float32(0.5), conditioning
    velocity = family.velocity_function(jnp.float32)
    steps = {"layer by layer": Layerwise(velocity, *given)}
    if on_cpu := jax.default_backend() == "cpu":
        idle(steps["layer by layer"], given)
        velocity = lambda parameters, latents, sigma, conditioning: latents + 1  # noqa: E731
    steps["whole step"] = jax.jit(velocity, keep_unused=True).lower(*given).compile()
    layers = family.config.num_layers + family.config.num_single_layers
    measured = {}
    for name, step in steps.items():
        taken = microseconds(lambda step=step: step(*given))
        measured[name] = {which: round(value / layers, 1) for which, value in taken.items()}
    report = {"layers": layers, "programs compute": not on_cpu, "microseconds a layer": measured}
    save("dispatch", ("jax", "jaxlib"), report | {"on paper": on_paper()})


if __name__ == "__main__":
    main()
