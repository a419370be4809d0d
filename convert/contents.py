"""Describes a file or folder of weights from its headers: kind, family and layout, how many of its layers are
known, and which are missing.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from . import flux1, flux2, lora_names, qwen_image, wan, z_image
from .component_names import Names, text_encoder_names, vae_names
from .dequantised import Dequantised
from .errors import UsageError
from .identify import BESIDE, Transformer, find_transformer, kind_of, refusal, three
from .lora_file import LoraFile
from .shapes import config_of, variant_of
from .single_file import Relaid, open_file
from .table import Rule

RULES = {
    "flux1": flux1.RULES,
    "flux2": flux2.RULES,
    "qwen_image": qwen_image.RULES,
    "wan": wan.RULES,
    "z_image": z_image.RULES,
}
# Layers that only some models of a family have.
OPTIONAL = "guidance_embedder"


@dataclass
class Contents:
    """The contents of `path`.

    `matched` counts layers; a weight and its bias are one. `unmatched` are tensors that no model of the
    family has. `missing` are tensors that the model lacks. `refused` is why jaxspd cannot use the file, None
    if it can. `config` holds the fields of a transformer's config.json that its shapes determine.
    """

    path: Path
    kind: str
    family: str | None
    layout: str
    parameters: int
    dtype: str
    matched: int
    unmatched: list[str]
    missing: list[str] = field(default_factory=list)
    prefix: str = ""
    variant: str | None = None
    config: dict | None = None
    # Numbers of other components' tensors in the same file, by the first part of their names.
    beside: dict[str, int] = field(default_factory=dict)
    refused: str | None = None


def describe(path: Path) -> Contents:
    """The contents of a file of weights or a component's folder. Raises UsageError if it cannot be read or is
    of none of the kinds.
    """
    tensors = open_file(path)
    keys = tensors.keys()
    kind = kind_of(keys)
    if kind == "lora":
        return _lora(path, tensors)
    if found := find_transformer(keys):
        return _transformer(path, tensors, found)
    if kind is None and tensors.foreign:
        tensors.check_floats()
    if kind is None:
        what = f"its tensors are {three(keys)}" if keys else "it has no tensors"
        raise UsageError(
            f"{path} is no transformer, LoRA, VAE or text encoder of a model that jaxspd runs: {what}"
        )
    names = vae_names(keys) if kind == "vae" else text_encoder_names(keys, tensors.shape)
    return _component(path, tensors, kind, names)


def _transformer(path: Path, tensors: Dequantised, found: Transformer) -> Contents:
    refused, shapes = None, {}
    tensors = tensors.without(BESIDE)
    try:
        tensors.check_floats()
        shapes = Relaid(tensors, found).shapes()
        refused = refusal(found, shapes)
    except UsageError as error:
        refused = str(error)
    present = {target.key for targets in found.targets.values() for target in targets}
    absent = set(expected(RULES[found.family], present)) - present
    missing = sorted(found.prefix + name for name in found.layout.sources(absent))
    if missing and not refused:
        refused = f"{len(missing)} tensors are missing: {three(missing)}"
    return Contents(
        path,
        "transformer",
        found.family,
        found.layout.name,
        **_measures(tensors, found.targets),
        matched=len(layers(found.targets)),
        unmatched=list(found.unmatched),
        missing=missing,
        prefix=found.prefix,
        variant=variant_of(found.family, shapes),
        config=config_of(found.family, shapes),
        beside=dict(Counter(key.split(".")[0] for key in found.beside)),
        refused=refused and refused.removeprefix(f"{path} "),
    )


def _lora(path: Path, tensors: Dequantised) -> Contents:
    shapes = tensors.shapes()
    found = lora_names.parse(shapes)
    if found is None:
        raise UsageError(
            f"{path} is a LoRA for another model than jaxspd runs: its tensors are {three(tensors.keys())}"
        )
    try:
        LoraFile(path)
        refused = None
    except UsageError as error:
        refused = str(error).removeprefix(f"{path} ").removeprefix(f"{path}: ")
    if found.unmatched and not refused:
        refused = f"{len(found.unmatched)} tensors belong to no layer: {three(found.unmatched)}"
    return Contents(
        path,
        "lora",
        found.family,
        found.dialect,
        **_measures(tensors, shapes),
        matched=len(found.modules),
        unmatched=list(found.unmatched),
        missing=[
            f"{name} {'up' if 'down' in roles else 'down'}"
            for name, roles in found.modules.items()
            if len({"down", "up"} & roles.keys()) == 1
        ],
        beside={"text encoders": len(found.text)} if found.text else {},
        refused=refused,
    )


def _component(path: Path, tensors: Dequantised, kind: str, names: Names) -> Contents:
    return Contents(
        path,
        kind,
        names.family,
        names.layout,
        **_measures(tensors, names.matched),
        matched=len(layers(names.matched)),
        unmatched=sorted(names.unmatched),
        variant=names.variant,
        refused=names.refused,
    )


def _measures(tensors: Dequantised, keys: Iterable[str]) -> dict:
    """The number of parameters under `keys`, and their stored types, the most frequent first."""
    sizes: Counter[str] = Counter()
    for key in keys:
        sizes[tensors.stored_dtype(key)] += prod(tensors.shape(key))
    kinds = [kind for kind, size in sizes.most_common() if size]
    return {"parameters": sizes.total(), "dtype": ", ".join(kinds)}


def layers(keys: Iterable[str]) -> set[str]:
    """The names of the layers to which the tensors `keys` belong."""
    return {re.sub(r"\.(weight|bias|scale|gamma)$", "", key) for key in keys}


def expected(rules: Sequence[Rule], present: Iterable[str]) -> list[str]:
    """The names that diffusers gives to the tensors of a whole model. `present`, some of them, tell how many
    blocks it has.
    """
    present = set(present)
    counts: dict[str, int] = {}
    for key in present:
        stack, *rest = key.split(".")
        if rest and rest[0].isdecimal():
            counts[stack] = max(counts.get(stack, 0), int(rest[0]) + 1)
    optional = any(OPTIONAL in key for key in present)
    return [
        rule.official.replace("{}", str(number))
        for rule in rules
        if optional or OPTIONAL not in rule.official
        for number in (range(counts.get(rule.official.split(".")[0], 0)) if "{}" in rule.official else [0])
    ]
