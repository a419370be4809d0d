"""Measures what compiling costs.

    python bench/compiling.py

The wall time to compile a mid-size FLUX.1 is measured for one resolution, for the other, for both at once,
and for both from the cache. For models of several depths, both are compiled layer by layer as jaxspd does,
and as one program with the layers unrolled or scanned. Every figure comes from fresh processes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import median

import jax
import jax.numpy as jnp
from layers import WAYS, compiled_step, running
from machine import environment, save
from presets import SMALL_FLUX

from jaxspd.families.flux1 import Family
from jaxspd.models.flux1 import Flux1Config

GRIDS = {"coarse": (32, 32), "fine": (64, 64)}
DEPTHS = (1, 2, 4)
ROUNDS = 3


def family_of(depth: int) -> Family:
    sizes = {k: v for k, v in SMALL_FLUX.transformer.items() if not k.endswith("layers")}
    config = Flux1Config(num_layers=2 * depth, num_single_layers=4 * depth, guidance_embeds=True, **sizes)
    return replace(Family(), config=config)


def one(way: str, depth: int, grids: list[str]) -> float:
    """The seconds that this process takes to compile the steps of `grids`, all at once."""
    family = family_of(depth)
    with running(way, family):
        velocity, parameters = family.velocity_function(jnp.float32), family.abstract_parameters(jnp.float32)

    def compiled(grid: str) -> None:
        latents = jax.ShapeDtypeStruct((1, 16, *GRIDS[grid]), jnp.float32)
        compiled_step(way, velocity, parameters, latents, family.abstract_conditioning(1))

    begin = time.perf_counter()
    with running(way, family), ThreadPoolExecutor(len(grids)) as pool:
        list(pool.map(compiled, grids))
    return time.perf_counter() - begin


def fresh(cache: str, **asked) -> float:
    """The result of `one` in a fresh process, which compiles into `cache`."""
    command = [sys.executable, __file__, "--one", json.dumps(asked)]
    return json.loads(subprocess.check_output(command, env=environment(cache)))


def measure() -> dict[str, dict[str, float]]:
    """The median seconds of each case. The cases run in turns, `ROUNDS` times."""
    both, taken = list(GRIDS), defaultdict(list)
    for _ in range(ROUNDS):
        for name, grids in {"coarse": ["coarse"], "fine": ["fine"], "both": both}.items():
            asked = {"way": WAYS[0], "depth": 2, "grids": grids}
            with tempfile.TemporaryDirectory() as cache:
                taken[name].append(fresh(cache, **asked))
                if name == "both":
                    taken["both, from the cache"].append(fresh(cache, **asked))
        for depth in DEPTHS:
            for way in WAYS:
                with tempfile.TemporaryDirectory() as cache:
                    taken[f"both, {6 * depth} layers, {way}"].append(
                        fresh(cache, way=way, depth=depth, grids=both)
                    )
    return {"compile, s": {name: median(seconds) for name, seconds in taken.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(**json.loads(args.one))))
        return
    save("compiling", ("jax", "jaxlib", "flax"), {"grids": GRIDS, "rounds": ROUNDS, **measure()})


if __name__ == "__main__":
    main()
