"""Measures what `--dit-cpu-offload true` costs: a step with streamed layers, and one with resident weights.

    python bench/offload.py             # a mid-size FLUX.1, float32
    python bench/offload.py --official  # FLUX.1 [dev] itself, bfloat16, for a GPU that holds it

Both run in turns, in one process. On a CPU the host's memory is the device's, so only the copying counts.
"""

import argparse
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from machine import save
from presets import SMALL_FLUX
from timing import in_turns

from jaxspd.families.flux1 import Family
from jaxspd.models.flux1 import Flux1Config
from jaxspd.runtime.layerwise import Layerwise


def random_like(abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """A parameter with the sharding of `abstract`. It repeats one random row, since only its size matters."""
    row = np.random.default_rng(0).standard_normal(abstract.shape[-1:], np.float32) * 0.02
    return jax.device_put(np.broadcast_to(row, abstract.shape).astype(abstract.dtype), abstract.sharding)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", action="store_true", help="FLUX.1 [dev] in bfloat16")
    official = parser.parse_args().official
    family, dtype, sizes = Family(), jnp.bfloat16, (64, 128)
    if not official:
        config = Flux1Config(guidance_embeds=True, **SMALL_FLUX.transformer)
        family, dtype, sizes = replace(family, config=config), jnp.float32, (32, 64)
    conditioning = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), family.abstract_conditioning(1))
    grids = {}
    ways, weights = {"resident": False, "streamed": True}, {}
    for way, streamed in ways.items():
        own = replace(family, streamed=streamed)
        weights[way] = own, jax.tree.map(random_like, own.abstract_parameters(dtype))
    for size in sizes:
        latents, programs, calls = jnp.ones((1, 16, size, size)), {}, {}
        for way, (own, parameters) in weights.items():
            given = parameters, latents, np.float32(0.5), conditioning
            programs[way] = Layerwise(own.velocity_function(dtype), *given)
            calls[way] = lambda run=programs[way], given=given: run(*given).block_until_ready()
        seconds = in_turns(calls)
        grids[f"{size}×{size}"] = {
            **{f"{way}, s a step": value for way, value in seconds.items()},
            "streamed / resident": seconds["streamed"] / seconds["resident"],
            **{f"{way}, bytes on the device": programs[way].peak_bytes for way in ways},
        }
    count = sum(p.size for p in jax.tree.leaves(family.abstract_parameters(dtype)))
    save("offload", ("jax", "jaxlib"), {"parameters": count, "grids": grids})


if __name__ == "__main__":
    main()
