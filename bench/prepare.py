"""The process that makes what a comparison's frameworks share: checkpoint, plans, noise and text.

    python bench/prepare.py JOB.json ANSWER.json

The inputs of each cell are written as an `.npz` with `noise/<stage>` and, of the text, `positive/<name>` and
`negative/<name>` as `Family.encode` gives it.
"""

import dataclasses
import json
import sys
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from checkpoints import write_checkpoint

from jaxspd.components.pipeline import Components
from jaxspd.errors import UsageError
from jaxspd.families import open_family
from jaxspd.hub import DEMO
from jaxspd.plan_report import plan_report
from jaxspd.planning import plan_request, reading, schedule
from jaxspd.request import SamplingParams
from jaxspd.resolving import resolve
from jaxspd.sampling.noise import gaussian, stage_noises

SEED = 42
PROMPT = "a serene mountain lake at golden hour with snow"
# The tokens of a prompt of some forty words. They matter only to models that mask their padding.
WORDS = 64


def has_encoders(family) -> bool:
    """Whether the checkpoint has its text encoders' weights."""
    try:
        _ = Components(family, jnp.float32).texts
    except UsageError:
        return False
    return True


def encode(family, count: int, encoders: bool) -> dict[str, np.ndarray]:
    """The encoded prompt and, if `count` is 2, its negative prompt. Without `encoders` they are N(0, 1)."""
    if encoders:
        components = Components(family, jnp.float32)
        return components.encode_text([PROMPT, family.default_negative_prompt][:count])
    shapes = {k: v for k, v in family.abstract_conditioning(count).items() if k != "guidance"}
    encoded = {
        name: gaussian(SEED, 1000 + number, shape.shape)
        for number, (name, shape) in enumerate(shapes.items())
        if name != "lengths"
    }
    if "lengths" in shapes:
        encoded["lengths"] = np.full(count, min(WORDS, family.text_tokens), np.int32)
        encoded["text"][:, WORDS:] = 0
    return encoded


def warm_up(family, params: SamplingParams, levels: int) -> dict:
    """Request parameters that visit every grid for a step or two."""
    if not levels:
        return {"progressive_mode": "fullres", "num_inference_steps": 2}
    latent = params.height // family.pixels_per_latent, params.width // family.pixels_per_latent
    tokens = family.tokens((*family.leading(params.num_frames), *latent))
    sigmas = schedule(family, dataclasses.replace(params, num_inference_steps=levels + 1), tokens)[:-1]
    return {
        "progressive_mode": "dct",
        "progressive_noise": "fresh",
        "progressive_levels": levels,
        "progressive_sigmas": tuple(float(a + b) / 2 for a, b in pairwise(sigmas)),
        "num_inference_steps": levels + 1,
    }


def growth(family, params: SamplingParams) -> dict:
    """The keywords that make `torch_ref` plan the same stages."""
    if params.progressive_mode == "fullres":
        return {"mode": "fullres"}
    values = {"mode": params.progressive_mode, "levels": params.progressive_levels}
    if params.progressive_sigmas is not None:
        return values | {"thresholds": params.progressive_sigmas}
    spectrum = [family.spectrum.amplitude, family.spectrum.exponent]
    return values | {"delta": params.progressive_delta, "spectrum": spectrum}


def describe(family, request: dict) -> dict:
    """A request for both frameworks: jaxspd's parameters, and `torch_ref`'s keywords."""
    params = resolve(family, SamplingParams(**request))
    options = {
        "num_inference_steps": params.num_inference_steps,
        "guidance_scale": params.guidance_scale,
        **{
            name: value
            for name in ("flow_shift", "noise_levels")
            if (value := getattr(params, name)) is not None
        },
        **growth(family, params),
    }
    return {"request": request, "torch_options": options}


def main(job_file: str, answer_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    folder = DEMO if job["checkpoint"] is None else Path(job["checkpoint"])
    if job["checkpoint"] is not None:
        dtype = getattr(torch, job["dtype"])
        write_checkpoint(folder, job["family"], job["transformer"], job["vae"], dtype)
    # All cells have the same text.
    request = next(iter(job["cells"].values()))["request"]
    read = family = reading(open_family(folder), SamplingParams(**request))
    cells, encoded, encoders = {}, None, has_encoders(family)
    for name, cell in job["cells"].items():
        params = resolve(family, SamplingParams(**cell["request"]))
        plan, guided = plan_request(family, params), family.guided(params.guidance_scale)
        if encoded is None:
            encoded = encode(family, 1 + guided, encoders)
            if "lengths" in encoded:
                # PyTorch runs without padding.
                read = dataclasses.replace(family, text_tokens=int(encoded["lengths"].max()))
        noises = stage_noises([SEED], family.leading(params.num_frames), [s.latent for s in plan.stages])
        arrays = {f"noise/{stage}": noise for stage, noise in enumerate(noises)}
        for row, kind in enumerate(("positive", "negative")[: 1 + guided]):
            arrays |= {f"{kind}/{key}": array[row:][:1] for key, array in encoded.items()}
        np.savez(cell["inputs"], **arrays)
        warm = {**cell["request"], "progressive_delta": None, **warm_up(family, params, plan.levels)}
        cells[name] = {
            "plan": plan_report(family, plan),
            "steps": [stage.steps for stage in plan.stages],
            "run": describe(family, cell["request"]),
            "warm": describe(family, warm),
            "flops": {
                side: [(1 + guided) * s.steps * counted.forward_flops(s.tokens) for s in plan.stages]
                for side, counted in (("jax", family), ("torch", read))
            },
        }
    answer = {
        "checkpoint": str(folder),
        "family": family.name,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(family.abstract_parameters(jnp.float32))),
        "text_tokens": {"jax": family.text_tokens, "torch": read.text_tokens},
        "encoders": encoders,
        "prompt": PROMPT,
        "cells": cells,
    }
    Path(answer_file).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
