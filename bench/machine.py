"""The hardware of a measurement, its environment, and the place of its results."""

import json
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def hardware() -> str:
    """The GPU's name, or the CPU's name with its generation and number of cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    told = dict(re.findall(r"(.+?)\s*: (.+)", info.read_text())) if info.exists() else {}
    name = told.get("model name", platform.machine())
    # Virtual machines give CPUs of all generations the same name.
    if "cpu family" in told:
        name += f" (family {told['cpu family']}, model {told['model']})"
    return f"{name}, {os.cpu_count()} cores"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def environment(cache: Path | str | None = None) -> dict[str, str]:
    """Environment variables for a process, which finds the project and keeps its programs in `cache`."""
    path = os.pathsep.join(filter(None, [str(RESULTS.parents[1]), os.environ.get("PYTHONPATH")]))
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
    }
    return {**os.environ, "PYTHONPATH": path, **(kept if cache else {})}


def save(question: str, packages: tuple[str, ...], measured: dict[str, Any]) -> None:
    """Writes `measured`, with hardware and versions, under `results/question/`, and prints it."""
    machine = hardware()
    report = {"hardware": machine, "versions": {name: version(name) for name in packages}, **measured}
    file = RESULTS / question / f"{slug(machine)}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(file.read_text())
