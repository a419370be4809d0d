"""The tables of `bench/devices.py` for devices that share a step, with estimates of their time."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from device_models import MESHES, MODELS, Program, Published
from flax import nnx

from jaxspd.models.vae.coder import parameter_bytes


@dataclass(frozen=True)
class Card:
    """The speed that one device is assumed to reach.

    `flops` is FLOP/s of products in bfloat16; products in 8 bits take half the time. `memory` is bytes/s from
    its memory. `link` is bytes/s that it sends to the others while all send.
    """

    title: str
    flops: float
    memory: float
    link: float


CARDS = {
    "h100": Card("H100", 0.60 * 989e12, 0.8 * 3.35e12, 360e9),
    "a6000": Card("RTX A6000", 0.60 * 155e12, 0.8 * 768e9, 25e9),
    "v6e": Card("TPU v6e", 0.55 * 918e12, 0.8 * 1.64e12, 90e9),
}
# The seconds that a collective is assumed to take to begin, in the estimate that counts them.
BEGIN = 10e-6
COLUMNS = ["model", "layout", "weights", "peak, coarse/full", "layers with fused attention", "sends"]
COLUMNS += ["collectives", "kinds", "ms a step", "efficiency", "and 10 µs a collective"]
HEAD = """# Several devices that share a step

The layout is what jaxspd chooses, and says, where nothing is asked; of large models the other one too:
weights whole on every device, or sharded (`--fsdp true`). Of a guided step on an even number of devices, each
half of these makes one of the two predictions. From the compiled programs, of a step on the coarse and on the
full grid:

- *weights*: on each device. *peak*: what a step takes of it, with them.
- *sends*: what each device sends to the others in a step, in GB, and by how many collectives; then the GB of
  a step on the full grid by kind.

On paper, a step takes the longer of multiplying and of reading its weights once, and then what it sends, as
if nothing went on at the same time. Every device reads all weights, whatever the grid, but of modulation only
a part: that is what coarse steps lose. FLOPs are those of a GPU's own program; a TPU's does not tell, and is
taken to have an even share. *Efficiency* is the time on one device, over the number of devices and the time
on all of them. The last column is the same if each collective takes 10 µs to begin, which is a guess.
"""


def seconds(card: Card, eight_bits: bool, flops: float, weights: float, sent: float = 0) -> float:
    """The seconds of a step, from one device's FLOPs, the bytes of its weights and those that it sends."""
    multiplying = flops / card.flops / (2 if eight_bits else 1)
    return max(multiplying, weights / card.memory) + sent / card.link


def read_by_each(published: Published, devices: int) -> float:
    """The bytes of weights that each device reads in a step.

    A device reads all weights, but only a part of those of modulation, whose channels the devices divide
    among themselves.
    """
    sharing = devices // 2 if published.guided and devices % 2 == 0 else devices
    total = 0.0
    for path, weight in nnx.to_flat_state(published.family.abstract_parameters(jnp.bfloat16)):
        shared = any("modulation" in f"{part}" for part in path)
        total += parameter_bytes(weight.get_value()) / (sharing if shared else 1)
    return total


def paper(card: Card, devices: int, published: Published, found: dict) -> tuple[float, float, float]:
    """The seconds of a step, its efficiency, and its efficiency if collectives take time to begin."""
    eight_bits, sent = bool(published.model.quantize), sum(found["sent"].values())
    alone = seconds(card, eight_bits, found["flops"], found["weights"]) / devices
    flops, read = found["device_flops"] or found["flops"] / devices, read_by_each(published, devices)
    together = seconds(card, eight_bits, flops, read, sent)
    return together, alone / together, alone / (together + BEGIN * sum(found["collectives"].values()))


def rows(mesh: str, answers: dict) -> list[list[str]]:
    """A row for each model and layout for which both grids are known."""
    card, devices = parts(mesh)
    lines = []
    for model in MODELS:
        published, known = Published(model), answers.get(model.name, {})
        for sharded in (False, True):
            names = [Program("denoise", grid, sharded=sharded).name for grid in published.grids]
            found = [known.get(name, {}) for name in names]
            if all("sent" in one for one in found):
                layout = "sharded" if sharded else "whole"
                first = [model.name, layout + (", chosen" if found[-1]["chosen"] else "")]
                lines.append([*first, *cells(card, devices, published, found)])
    return lines


def cells(card: Card, devices: int, published: Published, found: list[dict]) -> list[str]:
    """The cells for a model and a layout. `found` are the answers for each grid."""

    def each(tell: Callable[[dict], str]) -> str:
        return "/".join(map(tell, found))

    fused = all(one["layers"] == one["fused_layers"] for one in found)
    kinds = sorted(found[-1]["sent"].items(), key=lambda pair: -pair[1])
    told = [paper(card, devices, published, one) for one in found]
    return [
        gb(found[-1]["held"]),
        each(lambda one: gb(one["bytes"])),
        "all" if fused else each(lambda one: f"{one['fused_layers']} of {one['layers']}"),
        each(lambda one: gb(sum(one["sent"].values()))),
        each(lambda one: str(sum(one["collectives"].values()))),
        ", ".join(f"{kind} {gb(size)}" for kind, size in kinds if size >= 5e6),
        "/".join(f"{1e3 * time:.1f}" for time, _, _ in told),
        "/".join(f"{share:.0%}" for _, share, _ in told),
        "/".join(f"{share:.0%}" for _, _, share in told),
    ]


def parts(mesh: str) -> tuple[Card, int]:
    """A mesh's card, and its number of devices."""
    kind, _, count = mesh.partition("-")
    return CARDS[kind], int(count)


def gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def markdown(answers: dict) -> list[str]:
    """The lines for all meshes that have answers."""
    if not any(mesh in answers for mesh in MESHES):
        return []
    lines = [HEAD]
    for mesh in MESHES:
        if mesh not in answers:
            continue
        card, devices = parts(mesh)
        lines += [
            f"## {devices} × {card.title}",
            "",
            f"Assumed of each: {card.flops / 1e12:.0f} TFLOP/s, {card.memory / 1e12:.2f} TB/s of memory, "
            f"{card.link / 1e9:.0f} GB/s to the others.",
            "",
        ]
        lines += table(COLUMNS, rows(mesh, answers[mesh]))
    return lines


def table(head: list[str], cells: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *cells)] + [""]
