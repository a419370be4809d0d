"""How fast is growing the grid, and how fast is jaxspd, against PyTorch on the same machine?

    python bench/compare.py                 # the `cpu` preset: minutes
    python bench/compare.py --preset full   # official configurations, for a GPU that holds them

The frameworks get the same weights, noise, text and schedule. Each runs in processes of its own, in turns, so
that a machine that slows down slows all of them. Each process's answer is kept in the `--work` folder at
once. So an interrupted run continues from there, as long as neither code nor versions have changed. The
results, `compare.json`, `compare.md` and `compare.png`, go to a folder named after this hardware.
"""

import argparse
import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path

import compare_numbers
import compare_report
import numpy as np
import platformdirs
from compare_numbers import JUDGE
from machine import RESULTS, environment, hardware, slug
from presets import FULLRES, PRESETS, Model, Preset

HERE = Path(__file__).resolve().parent
VERSIONS = ("jax", "jaxlib", "flax", "torch", "diffusers", "numpy")
# Each framework's script, and which cells it runs. PyTorch compiles full resolution in a process that has
# seen no other size.
FRAMEWORKS = {
    JUDGE: ("torch_worker.py", lambda cell: True),
    "jaxspd": ("jax_worker.py", lambda cell: True),
    "PyTorch, compiled": ("torch_worker.py", lambda cell: cell.name == FULLRES),
    "PyTorch, compiled, progressive": ("torch_worker.py", lambda cell: cell.name != FULLRES),
}


def sources() -> str:
    """A digest of the code that is measured."""
    digest = hashlib.sha256()
    for folder in ("jaxspd", "convert", "torch_ref", "bench"):
        for path in sorted((HERE.parent / folder).rglob("*.py")):
            if not path.name.startswith("compare"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


class ProcessFailed(Exception):
    """A process of the comparison ended without an answer."""


class Answers:
    """The processes' answers, kept in a file of the work folder."""

    def __init__(self, work: Path, setting: dict):
        self.file = work / "answers.json"
        self.values = {"setting": setting, "processes": {}}
        kept = json.loads(self.file.read_text()) if self.file.exists() else None
        if kept and kept["setting"] == json.loads(json.dumps(setting)):
            self.values = kept

    def hold(self, keys: Iterable[str]) -> bool:
        """Whether the answers of all `keys` are kept."""
        return all(key in self.values["processes"] for key in keys)

    def once(self, key: str, ask) -> dict:
        """The answer kept under `key`. If there is none, `ask()` gives it, and it is kept."""
        processes = self.values["processes"]
        if key not in processes:
            print(key, flush=True)
            processes[key] = ask()
            partly = self.file.with_suffix(".partly")
            partly.write_text(json.dumps(self.values))
            partly.replace(self.file)
        return processes[key]


def run(script: str, job: dict, compiled: Path | None = None) -> dict:
    """Runs `script` in a process, which keeps compiled programs in `compiled`, and returns its answer.

    Raises ProcessFailed if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "job.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(job))
        command = [sys.executable, HERE / script, asked, answered]
        done = subprocess.run(command, env=environment(compiled))
        if done.returncode:
            raise ProcessFailed(
                f"{script} failed with exit code {done.returncode}; run again to go on from here"
            )
        return json.loads(answered.read_text())


def prepare(model: Model, preset: Preset, folder: Path) -> tuple[dict, dict]:
    """The answer of `prepare.py` for a model, and each cell with the files of its inputs."""
    cells = {
        cell.name: {"request": {**model.request, **cell.request}, "inputs": str(folder / f"{n}.npz")}
        for n, cell in enumerate(model.cells)
    }
    job = {
        "checkpoint": str(folder / f"checkpoint-{preset.dtype}") if model.family else None,
        "family": model.family,
        "transformer": model.transformer,
        "vae": model.vae,
        "dtype": preset.dtype,
        "cells": cells,
    }
    prepared = run("prepare.py", job)
    return prepared, {name: {**cell, **prepared["cells"][name]} for name, cell in cells.items()}


def ask(framework: str, cells: dict, prepared: dict, preset: Preset, folder: Path, anew: bool) -> dict:
    """The answer of one process of `framework`, with its latents' distances from the judge's.

    The process finds compiled programs, unless it is to compile `anew`.
    """
    script, _ = FRAMEWORKS[framework]
    compiled = folder.parent / "compiled" / folder.name / slug(framework)
    if anew:  # An interrupted process may have left programs.
        shutil.rmtree(compiled, ignore_errors=True)

    def latents(name: str, of: str) -> str:
        return str(folder / f"{slug(f'{of} {name}')}.npy")

    job = {
        **{key: prepared[key] for key in ("checkpoint", "encoders", "prompt")},
        "cells": {name: {**cell, "latents": latents(name, framework)} for name, cell in cells.items()},
        "dtype": preset.dtype,
        "matmul": preset.matmul,
        "repeats": preset.repeats,
        "framework": "compiled" if "compiled" in framework else "eager",
    }
    answer = run(script, job, compiled)
    for name, cell in answer["cells"].items():
        ours, judged = (np.load(latents(name, of)).astype(np.float64) for of in (framework, JUDGE))
        cell["distance"] = float(np.linalg.norm(ours - judged) / np.linalg.norm(judged))
    return answer


def measure(preset: Preset, answers: Answers, work: Path, until: float = math.inf) -> Iterator[dict]:
    """Yields the results after each round of each model, for the models that have run.

    They are `{model: {**prepared, "processes": {framework: [answer of each round]}}}`. No process begins
    after `until`, a time of the monotonic clock. If a process of a model fails, no other process of that
    model begins. Another run measures what is missing.
    """
    results, prepared, failed = {}, {}, set()
    for turn, model in product(range(preset.rounds), preset.models):
        keys = {framework: f"{model.name} · {framework} · {turn + 1}" for framework in FRAMEWORKS}
        if model.name in failed or (time.monotonic() >= until and not answers.hold(keys.values())):
            continue
        folder = work / slug(model.name)
        folder.mkdir(parents=True, exist_ok=True)
        found = {}
        try:
            if model.name not in prepared:
                prepared[model.name] = prepare(model, preset, folder)
            about, cells = prepared[model.name]
            for framework, (_, runs) in FRAMEWORKS.items():
                if time.monotonic() >= until and not answers.hold([keys[framework]]):
                    break
                own = [cell.name for cell in model.cells if runs(cell)]
                # Each turn begins with another cell, because the first in a process runs on a rested machine.
                first = turn % len(own)
                own = {name: cells[name] for name in own[first:] + own[:first]}
                asked = partial(ask, framework, own, about, preset, folder, anew=not turn)
                found[framework] = answers.once(keys[framework], asked)
        except ProcessFailed as error:
            print(f"{model.name}: {error}", file=sys.stderr)
            failed.add(model.name)
        if len(found) < len(FRAMEWORKS):
            continue
        if model.name not in results:
            results[model.name] = {
                **{key: value for key, value in about.items() if key != "checkpoint"},
                "request": model.request,
                "published": {cell.name: cell.published for cell in model.cells},
                "published_speedup": {cell.name: cell.published_speedup for cell in model.cells},
                "published_note": model.note,
                "processes": {framework: [] for framework in FRAMEWORKS},
            }
        for framework, answer in found.items():
            results[model.name]["processes"][framework].append(answer)
        yield results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument(
        "--output", type=Path, help="folder of results (default: one in bench/results/compare)"
    )
    parser.add_argument("--work", type=Path, help="folder of checkpoints, inputs and unfinished runs")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no process after this time")
    args = parser.parse_args(arguments)

    until = time.monotonic() + 60 * args.minutes
    preset, machine = PRESETS[args.preset], hardware()
    output = args.output or RESULTS / "compare" / f"{args.preset}-{slug(machine)}"
    work = args.work or platformdirs.user_cache_path("jaxspd") / "compare" / args.preset
    setting = {
        "hardware": machine,
        "versions": {name: version(name) for name in VERSIONS},
        "preset": {"name": args.preset, **asdict(preset)},
        "sources": sources(),
    }
    work.mkdir(parents=True, exist_ok=True)
    found = output / "compare.json"
    if found.exists() and json.loads(found.read_text())["hardware"] != machine:
        raise SystemExit(f"{output} holds results of other hardware; give another --output")
    report = None
    for models in measure(preset, Answers(work, setting), work, until):
        report = {**setting, "models": models}
        save(report, output)
    if report is None:
        raise SystemExit("no model has run in every framework; give it more --minutes, or see what failed")
    print(compare_report.markdown(report))
    missing = [m.name for m in preset.models if len(rounds_of(report, m.name)) < preset.rounds]
    for name in missing:
        print(f"{name}: {len(rounds_of(report, name))} of {preset.rounds} rounds have run", file=sys.stderr)
    wrong = compare_numbers.wrong(report)
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    return 1 if wrong or (missing and args.minutes == math.inf) else 0


def rounds_of(report: dict, name: str) -> list:
    """The judge's answers for the rounds of a model that are in the report."""
    return report["models"].get(name, {"processes": {JUDGE: []}})["processes"][JUDGE]


def save(report: dict, output: Path) -> None:
    """Writes the report, its tables and its plot."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "compare.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    (output / "compare.md").write_text(compare_report.markdown(report))
    compare_report.plot(report).savefig(output / "compare.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
