"""Measures how fast official weights load and how much memory that takes, beside the machine's limits.

    python bench/loading.py --work /tmp/loading

A random FLUX.1 transformer of official widths, as deep as `--gigabytes` asks, is written in shards. It is
loaded onto the CPU, each time in a fresh process. The files are in the page cache, as if they had just been
read. Rates count bytes of the loaded weights. Memory is what the process gained, mapped files included.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import environment, save

CASES = (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32"))


def write_checkpoint(work: Path, gigabytes: float, dtype: str) -> Path:
    """Writes a folder with a transformer of about `gigabytes`, unless it is there, and returns it."""
    import torch
    from checkpoints import write_random
    from diffusers import FluxTransformer2DModel

    # A double block and two single ones, FLUX.1's proportion, take 1.25 GB in bfloat16. The rest takes 0.1
    # GB.
    size = gigabytes / (2 if dtype == "float32" else 1)
    layers = max(1, round((size - 0.1) / 1.25))
    folder = work / f"{dtype}-{layers}"
    if not (folder / "complete").exists():
        options = {"num_layers": layers, "num_single_layers": 2 * layers, "guidance_embeds": True}
        weights = folder / "transformer"
        write_random(weights, FluxTransformer2DModel, options, getattr(torch, dtype), "700MB", 0)
        (folder / "complete").touch()
    return folder


def best(call: Callable[[], object], times: int = 3) -> float:
    """The seconds of the fastest of `times` calls."""
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def resident(name: str) -> int:
    """The process's bytes in memory, now (VmRSS) or at most (VmHWM; getrusage would count the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(folder: Path, stored: str, target: str) -> dict:
    """Measures one load in this process, and then the machine's limits.

    These are reading the files, and copying as many weights into fresh memory, from dtype to dtype.
    """
    import jax
    import torch

    from jaxspd.convert.orbax_store import load_transformer
    from jaxspd.families.configs import read_transformer_config
    from jaxspd.families.flux1 import Family
    from jaxspd.models.flux1 import Flux1Config

    family = Family(config=read_transformer_config(folder, Flux1Config))
    abstract = family.abstract_parameters(target)
    jax.block_until_ready(jax.device_put(0.0))
    before = resident("VmRSS")
    begin = time.perf_counter()
    parameters = jax.block_until_ready(load_transformer(folder, abstract, family.rules))
    seconds = time.perf_counter() - begin
    gained = resident("VmHWM") - before
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(parameters)]
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    del parameters

    def read() -> None:
        for path in (folder / "transformer").glob("*.safetensors"):
            np.fromfile(path, np.uint8)

    source = torch.zeros(count, dtype=getattr(torch, stored))
    rates = {
        "load": sum(sizes) / seconds,
        "reading alone": sum(sizes) / best(read),
        "copying alone": sum(sizes) / best(lambda: source.to(getattr(torch, target), copy=True)),
    }
    return {
        "stored": stored,
        "loaded": target,
        "weights, GB": sum(sizes) / 1e9,
        "largest parameter, GB": max(sizes) / 1e9,
        "peak / weights": gained / sum(sizes),
        "GB/s": {name: round(rate / 1e9, 2) for name, rate in rates.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints; they are kept")
    parser.add_argument("--gigabytes", type=float, default=2.6, help="size of each checkpoint, about")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(Path(args.one[0]), *args.one[1:])))
        return
    cases = []
    for stored, target in CASES:
        folder = write_checkpoint(args.work, args.gigabytes, stored)
        command = [sys.executable, __file__, "--work", args.work, "--one", folder, stored, target]
        runs = [json.loads(subprocess.check_output(command, env=environment())) for _ in range(3)]
        cases.append(max(runs, key=lambda run: run["GB/s"]["load"]))
    save("loading", ("jax", "torch", "safetensors", "ml_dtypes"), {"cases": cases})


if __name__ == "__main__":
    main()
