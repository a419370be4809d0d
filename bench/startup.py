"""From command to picture: where the seconds of the demo go, once its programs are in the cache.

    python bench/startup.py

Runs `jaxspd generate` in fresh processes and takes medians. `rest` is all that the command does not report:
starting Python, importing JAX, reading configurations, writing the picture.
"""

import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

from compare import hardware, slug

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
    # Weights load and programs compile while the prompt is encoded; what is left of the latter is waited for.
    parts = {key: seconds[key] for key in ("encode", "compile", "decode")} | {
        "denoise": sum(seconds["denoise"])
    }
    return {"wall": wall, **parts, "rest": wall - sum(parts.values())}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        once(folder)  # fills the cache
        runs = [once(folder) for _ in range(RUNS)]
    report = {
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("jax", "torch", "transformers", "diffusers")},
        "seconds": {part: round(median(run[part] for run in runs), 2) for part in runs[0]},
        "runs": RUNS,
    }
    file = Path(__file__).parent / "results" / "startup" / f"{slug(report['hardware'])}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2) + "\n")
    print(file.read_text())


if __name__ == "__main__":
    main()
