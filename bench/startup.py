"""Measures where the demo's seconds go from command to picture, once its programs are in the cache.

    python bench/startup.py

It runs `jaxspd generate` in fresh processes, in turns with `python -c "import jax, flax.nnx"`, and takes
medians. `rest` is everything that the command does not report: starting Python, importing JAX, reading
configurations and writing the picture. `ratio` is the command's time divided by the sum of import and
denoising.
"""

import json
import subprocess
import sys
import tempfile
import time
from statistics import median

from machine import save

RUNS = 5
REQUEST = ("--progressive-mode", "dct_rewind", "--progressive-delta", "0.05", "--json")


def once(folder: str) -> dict[str, float]:
    """The seconds of one command, by part."""
    command = [sys.executable, "-m", "jaxspd", "generate", "--prompt", "a mountain lake", *REQUEST]
    begin = time.perf_counter()
    done = subprocess.run(
        [*command, "--output-path", folder], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
    )
    wall = time.perf_counter() - begin
    seconds = json.loads(done.stdout)["seconds"]
    # Weights load and programs compile while the prompt is encoded; `compile` is the wait for the rest of
    # that.
    parts = {key: seconds[key] for key in ("encode", "compile", "decode")} | {
        "denoise": sum(seconds["denoise"])
    }
    return {"wall": wall, **parts, "rest": wall - sum(parts.values())}


def importing() -> float:
    """The seconds of starting Python and importing JAX and Flax, which every command takes at least."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import jax, flax.nnx"], check=True)
    return time.perf_counter() - begin


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        once(folder)  # fills the cache
        runs = [{"import": importing(), **once(folder)} for _ in range(RUNS)]
    seconds = {part: round(median(run[part] for run in runs), 2) for part in runs[0]}
    ratio = median(run["wall"] / (run["import"] + run["denoise"]) for run in runs)
    measured = {"seconds": seconds, "ratio": round(ratio, 2), "runs": RUNS}
    save("startup", ("jax", "flax", "tokenizers"), measured)


if __name__ == "__main__":
    main()
