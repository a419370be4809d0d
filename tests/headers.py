"""Safetensors files without room for their tensors' values: only names, shapes and types matter."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

from jaxspd.convert.layouts import find
from tests.test_full_size import CHECKPOINTS
from tests.test_official_keys import of_rules

Shapes = dict[str, tuple[int, ...]]
BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1, "I8": 1}


def write_header(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype="BF16", others=None) -> Path:
    """Writes a file of tensors of `dtype`, except where `others` gives another dtype."""
    header, end = {}, 0
    for key, shape in shapes.items():
        kind = (others or {}).get(key, dtype)
        begin, end = end, end + prod(shape) * BYTES[kind]
        header[key] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def single_file(checkpoint: str, layout: str, prefix: str = "") -> Shapes:
    """Names and shapes in the single file of a published checkpoint."""
    shapes = of_rules(checkpoint)
    sources = find(CHECKPOINTS[checkpoint][0], layout).sources(shapes)
    return {
        prefix + source: (sum(shapes[t.key][0] for t in targets), *shapes[targets[0].key][1:])
        for source, targets in sources.items()
    }


def lora(weights: Shapes, name_of, down: str, up: str, rank: int, alpha: bool = False) -> Shapes:
    """Names and shapes of a LoRA for the matrices among `weights`.

    `name_of` gives a layer's name in the file; None leaves it out. No rank exceeds the number of outputs.
    """
    shapes: Shapes = {}
    for key, shape in weights.items():
        name = name_of(key.removesuffix(".weight")) if key.endswith(".weight") and len(shape) == 2 else None
        if name:
            least = min(rank, shape[0])
            shapes |= {f"{name}{down}": (least, shape[1]), f"{name}{up}": (shape[0], least)}
            shapes |= {f"{name}.alpha": ()} if alpha else {}
    return shapes
