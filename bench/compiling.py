"""What compiling costs.

    python bench/compiling.py

Of a mid-size FLUX.1: the wall time to compile one resolution, the other, and both at once; both again from
the cache; and both for models of several depths, layers scanned as jaxspd has them and layers unrolled.
Every figure comes from fresh processes.
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
from functools import partial
from statistics import median
from unittest.mock import patch

import jax
import jax.numpy as jnp
from machine import environment, save
from presets import SMALL_FLUX
from scanning import split_layers, unrolled

from jaxspd.families.flux1 import Family
from jaxspd.models import flux1
from jaxspd.models.flux1 import Flux1Config
from jaxspd.sampling.programs import SCALAR
from jaxspd.sampling.solvers import SOLVERS

GRIDS = {"coarse": (32, 32), "fine": (64, 64)}
DEPTHS = (1, 2, 4)
ROUNDS = 3


def family_of(depth: int) -> Family:
    sizes = {k: v for k, v in SMALL_FLUX.transformer.items() if not k.endswith("layers")}
    config = Flux1Config(num_layers=2 * depth, num_single_layers=4 * depth, guidance_embeds=True, **sizes)
    return replace(Family(), config=config)


def one(kind: str, depth: int, grids: list[str]) -> float:
    """In this process: seconds to compile the steps of `grids`, all at once."""
    family = family_of(depth)
    velocity, solver = family.velocity_function(jnp.float32), SOLVERS["euler"]
    parameters = family.abstract_parameters(jnp.float32)
    if kind == "unrolled":
        parameters = jax.eval_shape(partial(split_layers, family), parameters)

    def step(parameters, latents, sigma, next_sigma, conditioning):
        v = velocity(parameters, latents, sigma, conditioning)
        return solver.step((), latents, v, sigma, next_sigma)[0]

    def compiled(grid: str) -> None:
        latents = jax.ShapeDtypeStruct((1, 16, *GRIDS[grid]), jnp.float32)
        conditioning = family.abstract_conditioning(1)
        jax.jit(step).lower(parameters, latents, SCALAR, SCALAR, conditioning).compile()

    with patch.object(flux1, "scan", unrolled if kind == "unrolled" else flux1.scan):
        begin = time.perf_counter()
        with ThreadPoolExecutor(len(grids)) as pool:
            list(pool.map(compiled, grids))
    return time.perf_counter() - begin


def fresh(cache: str, **asked) -> float:
    """`one` in a process of its own, which compiles into `cache`."""
    command = [sys.executable, __file__, "--one", json.dumps(asked)]
    return json.loads(subprocess.check_output(command, env=environment(cache)))


def measure() -> dict[str, dict[str, float]]:
    """Median seconds, by question; every question is asked in turn, `ROUNDS` times over."""
    both, taken = list(GRIDS), defaultdict(list)
    for _ in range(ROUNDS):
        for name, grids in {"coarse": ["coarse"], "fine": ["fine"], "both": both}.items():
            asked = {"kind": "scanned", "depth": 2, "grids": grids}
            with tempfile.TemporaryDirectory() as cache:
                taken[name].append(fresh(cache, **asked))
                if name == "both":
                    taken["both, from the cache"].append(fresh(cache, **asked))
        for depth in DEPTHS:
            for kind in ("scanned", "unrolled"):
                with tempfile.TemporaryDirectory() as cache:
                    taken[f"both, {6 * depth} layers, {kind}"].append(
                        fresh(cache, kind=kind, depth=depth, grids=both)
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
