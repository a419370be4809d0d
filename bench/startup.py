"""From command to picture: where the seconds of the demo go, once its programs are in the cache.

    python bench/startup.py

Runs `jaxspd generate` in fresh processes, in turns with `python -c "import jax, flax.nnx"`, and takes
medians. `rest` is all that the command does not report: starting Python, importing JAX, reading
configurations, writing the picture. `ratio` is the command's time by that of the import and the denoising
together.
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
    """Seconds of one command, by part."""
    command = [sys.executable, "-m", "jaxspd", "generate", "--prompt", "a mountain lake", *REQUEST]
    begin = time.perf_counter()
    done = subprocess.run(
        [*command, "--output-path", folder], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
    )
    wall = time.perf_counter() - begin
    seconds = json.loads(done.stdout)["seconds"]
    # Weights load and programs compile while the prompt is encoded; `compile` is the wait for what is left.
    parts = {key: seconds[key] for key in ("encode", "compile", "decode")} | {
        "denoise": sum(seconds["denoise"])
    }
    return {"wall": wall, **parts, "rest": wall - sum(parts.values())}


def importing() -> float:
    """Seconds that starting Python and importing JAX and Flax take, which no command can go below."""
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
