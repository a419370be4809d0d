"""Compares results of simulated devices with those of one device.

It runs in its own process, since JAX counts its devices only once: `python -m tests.spread NAME=FOLDER…`
prints a line of JSON for each of `CASES`.
"""

import json
import os
import re
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np

from jaxspd import DiffGenerator, running
from jaxspd.components import denoiser
from jaxspd.families import open_family
from jaxspd.runtime.layerwise import LAYER, Layerwise
from jaxspd.runtime.residency import Residency
from jaxspd.sampling.guidance import guide
from jaxspd.sampling.loop import denoise
from jaxspd.target import Target

REQUEST = {
    "prompt": "a lake",
    "height": 96,  # 6×10 tokens, and 3×5 in the coarse stage
    "width": 160,
    "num_inference_steps": 3,
    "scheduler": "euler",
    "progressive_mode": "dct_rewind",
    "progressive_delta": 0.1,
}
# The model, where it is kept in another form also the name of that, its sharding, and other settings.
CASES = {
    "ulysses": ("flux1", {"num_gpus": 8, "lora_path": "lora", "lora_scale": 0.1}, {}),
    "cfg and ulysses": ("klein-base", {"num_gpus": 8}, {"negative_prompt": "haze"}),
    "three": ("z_image", {"num_gpus": 3}, {}),
    "fsdp": ("qwen_image orbax", {"num_gpus": 6, "fsdp": True}, {}),
    "ulysses of both": ("wan", {"num_gpus": 4, "ulysses_degree": 4}, {"num_frames": 5}),
    "not guided": (
        "klein-base",
        {"num_gpus": 4, "dit_cpu_offload": True, "quantize": "int8"},
        {"guidance_scale": 1.0, "height": 80, "width": 112, "progressive_mode": "fullres"},
    ),
}
# What one device is asked for, too.
ALIKE = ("dit_cpu_offload", "quantize", "lora_path", "lora_scale")
EXCHANGES = re.compile(r" all-to-all(?:-start)?\(")
# Matches a gathered matrix, but not vectors of one or two samples.
WEIGHTS = re.compile(r"= f32\[([3-9]|\d{2,}),\d+\]\S* all-gather")


# Halves the time that compiling takes. Later versions refuse to start with a flag that they do not have.
LESS_FUSION = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__[:2] == (0, 10) else ""


def environment(devices: int) -> dict[str, str]:
    """This process's environment, changed for a process with `devices` simulated devices. Little code runs
    often there, so its compilation is not optimised.
    """
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_llvm_disable_expensive_passes=true {LESS_FUSION}",
    }


def unbatched(guide, velocity, combine, batched):
    return guide(velocity, combine, batched=False)


def make(folder: str, spread: dict, request: dict, components=None):
    """The frames of an output, the velocity of each stage's noise, and the generator. `components` are
    another generator's text encoders and autoencoder, if they are to be shared.
    """
    velocities, made_by = [], DiffGenerator.from_pretrained(folder, compilation_cache=False, **spread)
    made_by._components = components or made_by._components

    def probed(programs, plan, _, none, noises, tell, take):
        parameters, conditioning = take(False)
        leaves, put = jax.tree.leaves(parameters), programs.target.put
        for noise, stage in zip(noises, plan.stages, strict=True):
            latents, sigma = np.asarray(noise), np.float32(stage.sigmas[0])
            state = put(programs.solver.init(latents))
            # An Euler step of -1 subtracts the velocity once.
            after, _ = programs.step(leaves, put(latents), state, sigma, sigma - 1, put(conditioning))
            velocities.append(latents - np.asarray(after))
        return denoise(programs, plan, parameters, conditioning, noises, tell, take)

    running.denoise = probed
    # Guidance in two forwards, as where memory is short.
    denoiser.guide = partial(unbatched, guide) if request.get("num_frames") else guide
    [output] = made_by.iterate(request, save_output=False, show_progress=False)
    return output.frames.astype(int), velocities, made_by


def collectives(made_by: DiffGenerator) -> dict[str, int | list[int]]:
    """The number of layer programs, how often each of them exchanges tokens for heads or back, and how many
    gather weights.
    """
    [programs] = made_by._denoiser._programs.values()
    steps = (future.result() for future in programs._programs.values())
    pieces = (piece for step in steps if isinstance(step, Layerwise) for piece in step._pieces)
    texts = {id(piece.program): piece.program.as_text() for piece in pieces}.values()
    layers = [text for text in texts if LAYER in text.partition("\n")[0]]
    return {
        "layers": len(layers),
        "exchanges": [len(EXCHANGES.findall(text)) for text in layers],
        "gathering": sum(bool(WEIGHTS.search(text)) for text in layers),
    }


def decoded(folder: str, target: Target) -> tuple[np.ndarray, list[int]]:
    """The frames that a video's autoencoder makes of noise on `target`, and the bytes that each device has to
    have for what its programs work on.
    """
    autoencoder = open_family(Path(folder)).open_autoencoder(np.float32, Residency(False, target))
    latents = np.random.default_rng(0).standard_normal((1, 4, 2, 12, 20)).astype(np.float32)
    with autoencoder._weights.lent_to(autoencoder._coder) as coder:
        frames = coder.decode(latents)
    return frames, [p.memory_analysis().temp_size_in_bytes for p in coder._programs.values()]


def main(arguments: list[str]) -> None:
    folders = dict(argument.split("=") for argument in arguments)
    (alone, whole), (spread, parts) = (
        decoded(folders["wan"], target) for target in (Target(), Target().over(jax.devices()))
    )
    difference = float(np.abs(alone - spread).max())
    print(json.dumps({"case": "decoding", "difference": difference, "whole": whole, "parts": parts}))
    for name, (model, spread, more) in CASES.items():
        request, spread = REQUEST | more, {k: folders.get(v, v) for k, v in spread.items()}
        alone = {k: v for k, v in spread.items() if k in ALIKE}
        official, *other = (folders[name] for name in model.split())
        frames, velocities, one = make(official, alone, request)
        ours, found, made_by = make(*(other or [official]), spread, request, one._components)
        parameters, _ = made_by._denoiser.load().result()
        held = [a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(parameters)]
        answer = {
            "case": name,
            "stages": len(velocities),
            "forward": [float(np.abs(a - b).max()) for a, b in zip(velocities, found, strict=True)],
            "size": [float(np.abs(a).max()) for a in velocities],
            "levels": int(np.abs(frames - ours).max()),
            "range": int(frames.max() - frames.min()),
            **collectives(made_by),
            "weights": sum(a.nbytes for a in jax.tree.leaves(parameters)),
            "held": sum(held),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
