"""Does jaxspd compute what PyTorch does, on this machine's device?

    make parity        # or: python bench/parity.py

On a GPU that JAX and PyTorch both see: every family at its official width with few layers, and at full size
where it fits in float32, at the published sizes. On a CPU: the official width with one layer of each kind, at
a small size. Both get the same random weights and text; the weights are in bfloat16 on disk, which float32
holds exactly. Each model predicts the velocity on both grids of a progressive plan, then runs the whole loop;
attention is compared alone, with and without padding. All of it in float32, without TF32, and in bfloat16.

PyTorch in float32 is the judge. In float32 jaxspd must lie within a fixed bound of it; in bfloat16 it may
be 1.2 times as far from it as PyTorch is. Otherwise the exit code is 1. Each framework and dtype runs in a
process of its own, so that only one model is in memory at a time. What a part found is kept in the `--work`
folder: an interrupted run goes on from there, as long as neither code nor versions have changed.
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
# Noise level and guidance of single predictions. PyTorch in bfloat16 rounds them before it multiplies them by
# 1000 and after; here it has nothing to round, so that its distance is that of its layers.
SIGMA, GUIDANCE = 0.5, 2.0
# A loop of two grids for every family, whose noise levels start at 1 and fall slowly.
LOOP_REQUEST = {
    "guidance_scale": GUIDANCE,
    "num_inference_steps": 4,
    "progressive_mode": "dct_rewind",
    "progressive_noise": "fresh",
    "progressive_sigmas": [0.9],
}
# Fields of transformers' configurations that count layers.
LAYERS = {"num_layers", "num_single_layers", "n_layers", "n_refiner_layers"}
# Few of the small ones: the denoising, which alone is compared, reads none of their weights.
VAES = {model.family: model.vae for model in PRESETS["cpu"].models}
# What activations, workspaces and the frameworks take beside the weights, in bytes and as a share of them.
MARGIN, SHARE = 6e9, 0.1


@dataclass(frozen=True)
class Scale:
    """How much is run on a kind of device: `layers` of each kind, `request` in place of what is published,
    and attention of so many queries, of a text's keys, and heads.
    """

    layers: int
    request: dict[str, Any]
    attention: tuple[int, int, int]


SCALES = {
    "cpu": Scale(1, {"height": 128, "width": 192, "num_frames": 5, "max_sequence_length": 96}, (320, 96, 4)),
    # Text of any length, so that models which mask their padding have some.
    "gpu": Scale(2, {"max_sequence_length": None}, (4608, 512, 24)),
}


def device() -> str:
    """`gpu` or `cpu`, where JAX and PyTorch both run; UsageError where they do not agree."""
    start_backend()
    ours, theirs = jax.default_backend(), "gpu" if torch.cuda.is_available() else "cpu"
    if ours != theirs:
        raise UsageError(
            f"JAX runs on a {ours}, PyTorch on a {theirs}: install the one that lacks the device for it, or "
            "hide the device (JAX_PLATFORMS=cpu, CUDA_VISIBLE_DEVICES=)"
        )
    return ours


def libraries() -> dict[str, str]:
    """Versions of what computes, CUDA's libraries among it."""
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
    """`model` with `layers` of each kind, and as wide as it is."""
    config = family_class(model.family)().config
    counts = {item.name: layers for item in fields(config) if item.name in LAYERS}
    return replace(
        model,
        name=f"{model.name}, {layers} layer{'s' * (layers > 1)} of each kind",
        transformer={**model.transformer, **counts},
    )


def parameters(model: Model) -> int:
    """How many the transformer has."""
    return sum(p.size for p in jax.tree.leaves(model.recipe().abstract_parameters(jnp.float32)))


def lacking(count: int, work: Path) -> str | None:
    """Why `count` parameters cannot be run here in float32, if so."""
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
    """Runs `job` in both frameworks and dtypes: of each output its distances, and what jaxspd said in
    bfloat16.
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
    """A folder for one part; what an interrupted one has left there goes first."""
    folder = work / "part"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def ask_model(model: Model, request: dict[str, Any], work: Path) -> dict:
    """Draws the model and compares what both frameworks make of it."""
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
    """Compares attention of image and text to themselves, and of the image to the text, heads of 128 channels
    as all families have them. Of two samples, the keys of the second are padded.
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
    """What there is to compare, each with how, or with why not."""
    scale = SCALES[where]
    yield "attention", partial(ask_attention, *scale.attention, work)
    models = [replace(model, vae=VAES[model.family]) for model in OFFICIAL]
    for model in models:
        few = few_layers(model, scale.layers)
        yield few.name, partial(ask_model, few, requested(few, scale), work)
    # The smallest first: what is found is kept, should a larger one fail.
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
    parser.add_argument("--work", type=Path, help="folder of checkpoints and of what is not finished")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no part after so long")
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
        except ProcessFailed as error:  # what the others find is reported all the same
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
