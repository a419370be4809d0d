"""Does jaxspd compute what PyTorch does, on this machine's device?

    make parity        # or: python bench/parity.py

On a GPU that JAX and PyTorch both see, every family runs at the published sizes: at its official width with
few layers, and at full size if that fits in float32. On a CPU every family runs at its official width with
one layer of each kind, at a small size. Both frameworks get the same random weights and text. The weights are
in bfloat16 on disk, which float32 holds exactly. Each model predicts the velocity on both grids of a
progressive plan, then runs the whole loop. Attention is also compared alone, with and without padding.
Everything runs in float32, without TF32, and in bfloat16.

PyTorch in float32 is the judge. In float32 jaxspd must lie within a fixed bound of it. In bfloat16 jaxspd may
be 1.2 times as far from it as PyTorch is. Otherwise the exit code is 1. Each framework and dtype runs in a
process of its own, so that only one model is in memory at a time. The result of each part is kept in the
`--work` folder. So an interrupted run continues from there, as long as neither code nor versions have
changed.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import parity_report
import platformdirs
import torch
from compare import VERSIONS, Answers, ProcessFailed, run, sources
from machine import RESULTS, hardware, slug
from parity_report import LOOP
from presets import OFFICIAL, PRESETS, Model

from jaxspd.errors import UsageError
from jaxspd.families import family_class
from jaxspd.runtime.backend import start_backend
from jaxspd.runtime.memory import host_memory, memory_limit

SCRIPTS = {"jax": "parity_jax.py", "torch": "parity_torch.py"}
DTYPES = ("float32", "bfloat16")
# The noise level and the guidance scale of single predictions. PyTorch in bfloat16 rounds them before and
# after it multiplies them by 1000. These values need no rounding, so PyTorch's distance is that of its
# layers.
SIGMA, GUIDANCE = 0.5, 2.0
# A loop over two grids for every family. All families' noise levels start at 1 and fall slowly.
LOOP_REQUEST = {
    "guidance_scale": GUIDANCE,
    "num_inference_steps": 4,
    "progressive_mode": "dct_rewind",
    "progressive_noise": "fresh",
    "progressive_sigmas": [0.9],
}
# The fields of transformers' configurations that count layers.
LAYERS = {"num_layers", "num_single_layers", "n_layers", "n_refiner_layers"}
# The small presets' autoencoders. Only the denoising is compared, and it reads none of their weights.
VAES = {model.family: model.vae for model in PRESETS["cpu"].models}
# What activations, workspaces and the frameworks take beside the weights: in bytes, and as a share of the
# weights.
MARGIN, SHARE = 6e9, 0.1


@dataclass(frozen=True)
class Scale:
    """How much runs on a kind of device.

    `layers` is the number of layers of each kind. `request` replaces parameters of the published request.
    `attention` are the numbers of queries, of a text's keys, and of heads.
    """

    layers: int
    request: dict[str, Any]
    attention: tuple[int, int, int]


SCALES = {
    "cpu": Scale(1, {"height": 128, "width": 192, "num_frames": 5, "max_sequence_length": 96}, (320, 96, 4)),
    # The text may have any length, so that models that mask padding have some.
    "gpu": Scale(2, {"max_sequence_length": None}, (4608, 512, 24)),
}


def device() -> str:
    """`gpu` or `cpu`, on which both JAX and PyTorch run. Raises UsageError if they do not agree."""
    start_backend()
    ours, theirs = jax.default_backend(), "gpu" if torch.cuda.is_available() else "cpu"
    if ours != theirs:
        raise UsageError(
            f"JAX runs on a {ours}, PyTorch on a {theirs}: install the one that lacks the device for it, or "
            "hide the device (JAX_PLATFORMS=cpu, CUDA_VISIBLE_DEVICES=)"
        )
    return ours


def libraries() -> dict[str, str]:
    """The versions of the frameworks and of CUDA's libraries."""
    found = {name: version(name) for name in VERSIONS}
    for package in distributions():
        if package.name.startswith(("nvidia-", "jax-cuda")):
            found[package.name] = package.version
    return found


def requested(model: Model, scale: Scale) -> dict[str, Any]:
    """The model's request at that scale."""
    changed = {
        name: value for name, value in scale.request.items() if name != "num_frames" or name in model.request
    }
    return {**model.request, **changed, **LOOP_REQUEST}


def few_layers(model: Model, layers: int) -> Model:
    """`model` at its full width, with `layers` layers of each kind."""
    config = family_class(model.family)().config
    counts = {item.name: layers for item in fields(config) if item.name in LAYERS}
    return replace(
        model,
        name=f"{model.name}, {layers} layer{'s' * (layers > 1)} of each kind",
        transformer={**model.transformer, **counts},
    )


def parameters(model: Model) -> int:
    """The number of the transformer's parameters."""
    return sum(p.size for p in jax.tree.leaves(model.recipe().abstract_parameters(jnp.float32)))


def lacking(count: int, work: Path) -> str | None:
    """Why a model of `count` parameters cannot run here in float32, or None if it can."""
    needed = 4 * count * (1 + SHARE) + MARGIN
    rooms = {"the device": memory_limit(jax.devices()[0]), "the host": host_memory()[0]}
    for place, room in rooms.items():
        if needed > room:
            return f"float32 takes {needed / 1e9:.0f} GB, {place} has {room / 1e9:.0f} GB"
    files, free = 2 * count * (1 + SHARE), shutil.disk_usage(work).free
    if files > free:
        return f"the checkpoint takes {files / 1e9:.0f} GB, the disk has {free / 1e9:.0f} GB free"
    return None


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """‖one - other‖ / ‖other‖, in float64."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    if one.shape != other.shape:
        raise ValueError(f"shapes {one.shape} and {other.shape} cannot be compared")
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def distances(job: dict, folder: Path) -> tuple[dict[str, dict], dict[str, Any]]:
    """Runs `job` in both frameworks and dtypes.

    Returns the distances of each output, and jaxspd's answer in bfloat16.
    """
    outputs = {}
    for dtype in DTYPES:
        for framework, script in SCRIPTS.items():
            path = folder / "outputs.npz"
            answer = run(script, {**job, "dtype": dtype, "outputs": str(path)})
            with np.load(path) as arrays:
                outputs[framework, dtype] = dict(arrays)
            if framework == "jax":
                said = answer
    judge, cases = outputs["torch", "float32"], {}
    for case, expected in judge.items():
        ours, theirs = (distance(outputs[name, "bfloat16"][case], expected) for name in SCRIPTS)
        cases[case] = {
            "float32": distance(outputs["jax", "float32"][case], expected),
            "jax": ours,
            "torch": theirs,
            "ratio": ours / theirs if theirs else math.inf,
            "apart": distance(outputs["jax", "bfloat16"][case], outputs["torch", "bfloat16"][case]),
        }
    return cases, said


@contextmanager
def scratch(work: Path) -> Iterator[Path]:
    """A context with an empty folder for one part. What an interrupted part left there is deleted first."""
    folder = work / "part"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def ask_model(model: Model, request: dict[str, Any], work: Path) -> dict:
    """Draws the model's weights at random and compares both frameworks' results."""
    with scratch(work) as folder:
        inputs = str(folder / "inputs.npz")
        job = {
            "checkpoint": str(folder / "checkpoint"),
            "family": model.family,
            "transformer": model.transformer,
            "vae": model.vae,
            "dtype": "bfloat16",
            "cells": {LOOP: {"request": request, "inputs": inputs}},
        }
        prepared = run("prepare.py", job)
        cell = prepared["cells"][LOOP]
        asked = {"checkpoint": job["checkpoint"], "inputs": inputs, "sigma": SIGMA, **cell["run"]}
        found, said = distances(asked, folder)
    grids = [stage["latent"] for stage in cell["plan"]["stages"]]
    names = {f"velocity/{n}": f"velocity, {h}×{w} latents" for n, (h, w) in enumerate(grids)}
    steps = " + ".join(map(str, cell["steps"]))
    return {
        "parameters": prepared["parameters"],
        "text tokens": prepared["text_tokens"],
        "request": request,
        "device": said["device"],
        "cases": {names.get(case, f"{LOOP}, {steps} steps"): values for case, values in found.items()},
    }


def ask_attention(queries: int, text: int, heads: int, work: Path) -> dict:
    """Compares attention of `queries` tokens to as many keys, and to the keys of a text.

    Heads have 128 channels, as in all families. There are two samples, and the second one's keys are padded.
    """
    rng, arrays = np.random.default_rng(0), {}
    kinds = {f"{queries} queries, {keys} keys": keys for keys in (queries, text)}
    for kind, keys in kinds.items():
        for name, tokens in {"query": queries, "key": keys, "value": keys}.items():
            drawn = rng.standard_normal((2, tokens, heads, 128), np.float32)
            arrays[f"{kind}/{name}"] = drawn.astype(ml_dtypes.bfloat16).astype(np.float32)
        arrays[f"{kind}/lengths"] = np.array([keys, keys - keys // 3], np.int32)
    with scratch(work) as folder:
        inputs = folder / "inputs.npz"
        np.savez(inputs, **arrays)
        cases, said = distances({"inputs": str(inputs), "kinds": list(kinds)}, folder)
    return {"heads": heads, **said, "cases": cases}


def parts(where: str, work: Path) -> Iterator[tuple[str, Callable[[], dict] | str]]:
    """Yields each part's name with the function that compares it, or with the reason why it cannot run."""
    scale = SCALES[where]
    yield "attention", partial(ask_attention, *scale.attention, work)
    models = [replace(model, vae=VAES[model.family]) for model in OFFICIAL]
    for model in models:
        few = few_layers(model, scale.layers)
        yield few.name, partial(ask_model, few, requested(few, scale), work)
    # The smallest runs first, so that its result is kept if a larger one fails.
    for model in sorted(models, key=parameters):
        name = f"{model.name}, full size"
        if where == "cpu":
            yield name, "needs a GPU"
        else:
            missing = lacking(parameters(model), work)
            yield name, missing or partial(ask_model, model, requested(model, scale), work)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, help="folder of results (default: one in bench/results/parity)"
    )
    parser.add_argument("--work", type=Path, help="folder of checkpoints and unfinished runs")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no part after this time")
    args = parser.parse_args(arguments)
    until = time.monotonic() + 60 * args.minutes
    try:
        where = device()
    except UsageError as error:
        print(f"parity: {error}", file=sys.stderr)
        return 2
    machine = hardware()
    output = args.output or RESULTS / "parity" / slug(machine)
    work = args.work or platformdirs.user_cache_path("jaxspd") / "parity"
    work.mkdir(parents=True, exist_ok=True)
    setting = {"hardware": machine, "versions": libraries(), "device": where, "sources": sources()}
    answers = Answers(work, setting)
    report = {**setting, "parts": {}, "skipped": {}, "failed": {}}
    for name, ask in parts(where, work):
        if time.monotonic() >= until and not answers.hold([name]):
            ask = "no time was left"
        if isinstance(ask, str):
            print(f"{name}: skipped, {ask}", flush=True)
            report["skipped"][name] = ask
            continue
        try:
            report["parts"][name] = answers.once(name, ask)
        except ProcessFailed as error:  # the other parts are still reported
            print(error, file=sys.stderr)
            report["failed"][name] = str(error)
    output.mkdir(parents=True, exist_ok=True)
    (output / "parity.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    text = parity_report.markdown(report)
    (output / "parity.md").write_text(text)
    print(text)
    wrong = parity_report.wrong(report)
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
