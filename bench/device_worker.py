"""Compiles programs of one published model for a card that need not be there, for `bench/devices.py`.

    python bench/device_worker.py CARD MODEL PROGRAM...

It prints a JSON line for each program. Its environment must be `devices.ENVIRONMENT`.
"""

import json
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from device_collectives import in_all
from device_models import MESHES, MODELS, Program, Published
from flax import nnx
from jax.experimental import topologies

from jaxspd.components.text_encoder import KINDS, encoding, without_table
from jaxspd.devices import Degrees, spread_over
from jaxspd.errors import first_line
from jaxspd.models.vae import Coder, abstract_autoencoder
from jaxspd.models.vae.coder import parameter_bytes, program_bytes
from jaxspd.runtime.layerwise import LAYER, Layerwise
from jaxspd.sampling.guidance import Guided, guide
from jaxspd.sampling.programs import SCALAR
from jaxspd.sampling.solvers import SOLVERS
from jaxspd.target import Target

TARGETS = Path(__file__).parent / "targets"
TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v6e-8": "v6e:2x4"}
# One device's memory in bytes. JAX may take nine tenths of it.
MEMORY = {"a6000": 48 * 2**30, "h100": 80 * 2**30, "v6e": 32 * 2**30}
# By platform, the text that shows that a program contains a fused attention kernel.
FUSED = {"gpu": "__cudnn$fmha", "tpu": "tpu_custom_call"}


@dataclass(frozen=True)
class Streamed:
    """A weight that comes from its file when its layer's turn is near."""

    shape: tuple[int, ...]
    dtype: jnp.dtype

    def fetch(self) -> jax.Array:
        raise NotImplementedError("this is only compiled")


def described(card: str, topology: str = "1x1x1") -> Any:
    """GPUs of the kind that `targets/` describes, together in one process."""
    jax.devices()  # finds the plugins that are installed
    text = "\n".join(
        line for line in (TARGETS / f"{card}.txtpb").read_text().splitlines() if not line.startswith("#")
    )
    return topologies.get_topology_desc(
        platform="cuda", topology_name=card, target_config=text, topology=topology
    )


def devices_of(card: str) -> list[jax.Device]:
    """The device of a card, the devices of a mesh, or this machine's for "cpu"."""
    if card == "cpu":
        return jax.devices("cpu")
    if card in TOPOLOGIES:
        found = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[card]).devices
        return found if card in MESHES else found[:1]
    kind, _, count = card.partition("-")
    return described(kind, f"1x1x{count or 1}").devices


def target_of(card: str) -> Target:
    """A target of the first of a card's devices."""
    return Target(devices_of(card)[0])


def spread_target(card: str, published: Published, sharded: bool | None) -> Target:
    """A target of the devices of a mesh, over which jaxspd spreads the model.

    If `sharded` is None, jaxspd chooses whether to shard the weights.
    """
    devices, family = devices_of(card), published.family
    limit = round(0.9 * MEMORY[card.partition("-")[0]])
    degrees = Degrees(len(devices), fsdp=sharded)
    return spread_over(Target(devices[0]), family, jnp.bfloat16, degrees, devices, limit)


def denoise(published: Published, program: Program, target: Target) -> Layerwise:
    """The program of a step, as `sampling.programs` makes it."""
    family, request, dtype = published.family, published.request, jnp.bfloat16
    velocity = guide(family.velocity_function(dtype), family.combine, batched=program.forwards == 1)
    solver, one = SOLVERS[request.scheduler], family.abstract_conditioning(1)
    shape = (1, *family.leading(request.num_frames), *published.grids[program.what])
    latents = jax.ShapeDtypeStruct(shape, jnp.float32)

    def step(parameters, latents, state, sigma, next_sigma, conditioning):
        v = velocity(parameters, latents, sigma, conditioning)
        return solver.step(state, latents, v.astype(jnp.float32), sigma, next_sigma)

    conditioning = Guided(one, one, jax.ShapeDtypeStruct((1,), jnp.float32)) if published.guided else one
    state = jax.eval_shape(solver.init, latents)
    arguments = family.abstract_parameters(dtype, target), latents, state, SCALAR, SCALAR, conditioning
    return Layerwise(step, *arguments, target=target)


def encode(published: Published, program: Program, target: Target) -> Layerwise:
    """The program that encodes a prompt, and a negative one if there is guidance, with streamed layers."""
    [asked] = (text for text in published.family.texts if text.part == program.what)
    _, kind = KINDS[asked.kind]
    architecture, dtype = kind(asked.published, asked.states), jnp.bfloat16
    graph, shapes = nnx.split(without_table(architecture, dtype))
    stored = jax.tree.map(lambda p: Streamed(p.shape, p.dtype), shapes)
    ids = jax.ShapeDtypeStruct((1 + published.guided, asked.tokens), jnp.int32)
    embedded = jax.ShapeDtypeStruct((*ids.shape, architecture.width), dtype)
    # FLUX.1's encoder attends to padding too.
    mask = None if published.family.name == "flux1" else ids
    return Layerwise(encoding(architecture, graph), stored, embedded, ids, mask, target=target)


def decode(published: Published, program: Program, target: Target) -> Coder:
    """The programs that decode one picture, or the chunks of one video, without tiles."""
    family, request = published.family, published.request
    module = abstract_autoencoder(family.vae, family.vae_dtype or jnp.bfloat16)
    coder = Coder(module, nnx.state(module), target=target)
    shape = (1, *family.leading(request.num_frames), *published.grids[program.what])
    # An autoencoder of videos takes a picture as a video of one frame.
    of_videos = family.vae.frames_per_latent > 1
    coder.prepare((*shape[:2], 1, *shape[2:]) if of_videos and len(shape) == 4 else shape)
    return coder


def answer(published: Published, program: Program, target: Target) -> dict:
    """The compiler's figures for one program."""
    begin = time.perf_counter()
    made = {"denoise": denoise, "encode": encode, "decode": decode}[program.kind](published, program, target)
    found = {"compile_seconds": round(time.perf_counter() - begin, 1)}
    family, platform = published.family, target.device.platform
    if program.kind == "decode":
        compiled = [*made._programs.values()]
        found |= {"bytes": max(map(program_bytes, compiled)), "weights": parameter_bytes(made.parameters)}
        often = {"only": 1, "first": 1, "later": family.leading(published.request.num_frames)[-1] - 1}
        runs = [(program, often[key[-1]]) for key, program in made._programs.items()]
        found |= estimate(runs, platform)
        return found
    pieces = [piece.program for piece in made._pieces]
    found["bytes"] = made.peak_bytes
    found |= estimate([(piece, 1) for piece in pieces], platform)
    if program.kind == "denoise":
        found["weights"] = parameter_bytes(family.abstract_parameters(jnp.bfloat16))
        grid = published.grids[program.what]
        tokens = family.tokens((*family.leading(published.request.num_frames), *grid))
        found["flops"] = (1 + published.guided) * family.forward_flops(tokens)
        texts = {id(piece): piece.as_text() for piece in pieces}
        layers = [id(piece) for piece in pieces if LAYER in texts[id(piece)].partition("\n")[0]]
        found["layers"] = len(layers)
        found["fused_layers"] = sum(FUSED.get(platform, "none such") in texts[key] for key in layers)
        if target.mesh is not None:
            weights = jax.tree.leaves(family.abstract_parameters(jnp.bfloat16, target))
            found["held"] = sum(prod(w.sharding.shard_shape(w.shape)) * w.dtype.itemsize for w in weights)
            found |= in_all(texts[id(piece)] for piece in pieces)
            if platform != "gpu":  # others write products in other ways
                found["device_flops"] = None
    return found


def estimate(runs: Iterable[tuple[jax.stages.Compiled, int]], platform: str) -> dict:
    """The TPU compiler's own estimate of cycles, without kernels of custom calls. Other platforms have none.

    `runs` are programs with how often each runs.
    """
    if platform != "tpu":
        return {}
    runs = [*runs]
    cycles = {
        id(program): sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', program.as_text())))
        for program, _ in runs
    }
    return {"cycles": sum(times * cycles[id(program)] for program, times in runs)}


def main(card: str, name: str, *names: str) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    [model] = (model for model in MODELS if model.name == name)
    published, mesh = Published(model), card in MESHES
    for program in published.on(card):
        if program.name not in names:
            continue
        try:
            target = spread_target(card, published, program.sharded) if mesh else target_of(card)
            found = answer(published, program, target)
            if mesh:
                chosen = spread_target(card, published, None)
                found["chosen"] = chosen.shard_weights == program.sharded
        except Exception as error:
            found = {"error": first_line(error)[:300]}
        print(json.dumps({"program": program.name, **found}, default=np.ndarray.item), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
