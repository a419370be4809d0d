"""What compiling costs, and whether scanning over the layers costs speed.

    python bench/compiling.py

Of a mid-size FLUX.1 with random weights: the wall time to compile one resolution, the other, and both at
once; both again from the cache; and, for models of several depths, compile time and seconds a step, layers
scanned as jaxspd has them and layers unrolled, each with weights of its own. Every figure comes from fresh
processes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from statistics import median
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from machine import environment, save
from presets import SMALL_FLUX
from timing import median_seconds

from jaxspd.families.flux1 import Family
from jaxspd.models import flux1
from jaxspd.models.flux1 import Flux1Config
from jaxspd.sampling.programs import abstract
from jaxspd.sampling.solvers import SOLVERS

GRIDS = {"coarse": (32, 32), "fine": (64, 64)}
DEPTHS = (1, 2, 4)
ROUNDS = 2


def unrolled(blocks, carry, *shared):
    """In place of `layers.scan`, for blocks whose parameters are tuples, one entry a layer."""
    graph, state = nnx.split(blocks)
    parameters = nnx.to_flat_state(state)
    for layer in range(len(parameters[0][1].get_value())):
        own = [(path, variable.replace(variable.get_value()[layer])) for path, variable in parameters]
        carry = nnx.merge(graph, nnx.from_flat_state(own))(carry, *shared)
    return carry


def split_layers(parameters: nnx.State) -> nnx.State:
    """Stacked parameters as tuples of layers."""
    return nnx.from_flat_state(
        [
            (path, variable.replace(tuple(variable.get_value())) if path[0].endswith("blocks") else variable)
            for path, variable in nnx.to_flat_state(parameters)
        ]
    )


def family_of(depth: int) -> Family:
    sizes = {k: v for k, v in SMALL_FLUX.transformer.items() if not k.endswith("layers")}
    config = Flux1Config(num_layers=2 * depth, num_single_layers=4 * depth, guidance_embeds=True, **sizes)
    return replace(Family(), config=config)


def random_parameters(family: Family) -> nnx.State:
    keys = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: jnp.asarray(keys.standard_normal(a.shape, np.float32) * 0.02, a.dtype),
        family.abstract_parameters(jnp.float32),
    )


def one(kind: str, depth: int, grids: list[str], timed: bool) -> dict:
    """In this process: seconds to compile the steps of `grids`, all at once, and if `timed` to run them."""
    from concurrent.futures import ThreadPoolExecutor

    family = family_of(depth)
    velocity, solver = family.velocity_function(jnp.float32), SOLVERS["euler"]
    parameters = random_parameters(family)
    if kind == "unrolled":
        parameters = split_layers(parameters)
    conditioning = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), family.abstract_conditioning(1))
    scalar = np.float32(0.5)

    def step(parameters, latents, conditioning):
        v = velocity(parameters, latents, scalar, conditioning)
        return solver.step((), latents, v, scalar, scalar)[0]

    def compiled(grid: str):
        latents = jax.ShapeDtypeStruct((1, 16, *GRIDS[grid]), jnp.float32)
        return jax.jit(step).lower(abstract(parameters), latents, abstract(conditioning)).compile()

    with patch.object(flux1, "scan", unrolled if kind == "unrolled" else flux1.scan):
        begin = time.perf_counter()
        with ThreadPoolExecutor(len(grids)) as pool:
            programs = dict(zip(grids, pool.map(compiled, grids), strict=True))
        answer = {"compile": time.perf_counter() - begin, "step": {}}
    for grid, program in programs.items() if timed else ():
        arguments = parameters, jnp.ones((1, 16, *GRIDS[grid])), conditioning
        answer["step"][grid] = median_seconds(
            lambda run=program, given=arguments: run(*given).block_until_ready(), 5
        )
    return answer


def fresh(cache: str, **asked) -> dict:
    """`one` in a process of its own, which compiles into `cache`."""
    command = [sys.executable, __file__, "--one", json.dumps(asked)]
    return json.loads(subprocess.check_output(command, env=environment(cache)))


def measure() -> dict:
    """All figures; every question is asked in turn, `ROUNDS` times over."""
    both, compiling, depths = list(GRIDS), {}, {}
    for _ in range(ROUNDS):
        for name, grids in {"coarse": ["coarse"], "fine": ["fine"], "both": both}.items():
            with tempfile.TemporaryDirectory() as cache:
                asked = {"kind": "scan", "depth": 2, "grids": grids, "timed": False}
                compiling.setdefault(name, []).append(fresh(cache, **asked)["compile"])
                if name == "both":
                    compiling.setdefault("both, from the cache", []).append(fresh(cache, **asked)["compile"])
        for depth in DEPTHS:
            for kind in ("scan", "unrolled"):
                with tempfile.TemporaryDirectory() as cache:
                    found = fresh(cache, kind=kind, depth=depth, grids=both, timed=True)
                depths.setdefault(kind, {}).setdefault(6 * depth, []).append(found)
    return {
        "compile, s": {name: median(taken) for name, taken in compiling.items()},
        "by depth": {
            kind: {
                blocks: {
                    "compile, s": median(found["compile"] for found in answers),
                    **{f"{g} step, s": median(found["step"][g] for found in answers) for g in GRIDS},
                }
                for blocks, answers in by_depth.items()
            }
            for kind, by_depth in depths.items()
        },
    }


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
