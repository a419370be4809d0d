"""Identifies a LoRA's family and its dialect, the way in which it is written, by the layers that it changes.

Several families share names of layers. Then sizes and numbers of blocks decide.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from .layout import Layout, Target
from .layouts import LAYOUTS
from .lora_layers import XLABS, Names, names_of, role_of, text_encoder

# Numbers of blocks of the published models.
BLOCKS = {
    "flux1": {"transformer_blocks": {19}, "single_transformer_blocks": {38}},
    "flux2": {"transformer_blocks": {5, 8}, "single_transformer_blocks": {20, 24, 48}},
    "qwen_image": {"transformer_blocks": {60}},
    "wan": {"blocks": {30, 40}},
    "z_image": {"layers": {30}},
}
# Outputs per input of layers in which the families differ.
WIDENING = {
    "flux1": {".proj_mlp": 4, ".ff.net.0.proj": 4},
    "flux2": {".to_qkv_mlp_proj": 9, ".ff.linear_in": 6, ".ff_context.linear_in": 6},
    "qwen_image": {".img_mlp.net.0.proj": 4, ".txt_mlp.net.0.proj": 4},
}


@dataclass(frozen=True)
class LoraNames:
    """The names in a LoRA file for a transformer of `family`.

    `modules` are the changed layers, by their names in the file; each maps the role of a tensor to its key.
    `layout` names the layout of the layers, and `dialect` the way in which the file is written. `text` are
    keys of text encoders; `unmatched` are keys that belong to no layer.
    """

    family: str
    layout: str
    dialect: str
    modules: Mapping[str, Mapping[str, str]]
    text: tuple[str, ...]
    unmatched: tuple[str, ...]


def parse(shapes: Mapping[str, tuple[int, ...]]) -> LoraNames | None:
    """The names in a LoRA whose tensors have these `shapes`. None if it changes no family's transformer."""
    named: dict[str, dict[str, str]] = {}
    text, unmatched = [], []
    for key in sorted(shapes):
        name, role = role_of(key) or (key, None)
        if text_encoder(name):
            text.append(key)
        elif role is None or role in named.get(name, ()):
            unmatched.append(key)
        else:
            named.setdefault(name, {})[role] = key
    readings = []
    for family in LAYOUTS:
        find = names_of(family).find
        layers = {name: layer for name, roles in named.items() if (layer := find(name, _suffix(roles)))}
        if layers:
            targets = {name: targets for name, (_, targets) in layers.items()}
            readings.append((_score(family, targets, named, shapes), family, layers.keys()))
    if not readings:
        return None
    _, family, found = max(readings, key=lambda reading: reading[0])
    unmatched += [key for name, roles in named.items() if name not in found for key in roles.values()]
    return LoraNames(
        family,
        max(_layouts(family), key=lambda layout: _known(layout, named)).name,
        _dialect(named, shapes.keys(), unmatched),
        {name: named[name] for name in found},
        tuple(text),
        tuple(sorted(unmatched)),
    )


def _suffix(roles: Collection[str]) -> str:
    """Which of a layer's tensors is changed: "weight", "bias" if only that, or "" for a modulation."""
    if set(roles) == {"diff_m"}:
        return ""
    return "bias" if set(roles) == {"diff_b"} else "weight"


def _layouts(family: str) -> list[Layout]:
    return [*LAYOUTS[family], *([XLABS] if family == "flux1" else [])]


def _known(layout: Layout, named: Mapping[str, Collection[str]]) -> int:
    """How many of the layers `named` a layout has. Layouts share some names."""
    find = Names([layout]).find
    return sum(find(name, _suffix(roles)) is not None for name, roles in named.items())


def _score(
    family: str,
    found: Mapping[str, tuple[Target, ...]],
    named: Mapping[str, Mapping[str, str]],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple:
    """How well a family explains a LoRA: first names, then sizes, then numbers of blocks."""
    sizes = 0
    numbers: dict[str, set[int]] = {}
    for name, targets in found.items():
        up, down = (shapes.get(named[name].get(role, ""), ()) for role in ("up", "down"))
        for target in targets:
            stack, *rest = target.key.split(".")
            if rest and rest[0].isdecimal():
                numbers.setdefault(stack, set()).add(int(rest[0]))
            for layer, ratio in WIDENING.get(family, {}).items():
                if target.key.endswith(f"{layer}.weight") and len(up) == len(down) == 2:
                    held = up[0] * len(target.parts) // target.units
                    sizes += 1 if held == ratio * down[1] else -1
    published = BLOCKS.get(family, {})
    beyond = sum(max(held) >= max(published[stack]) for stack, held in numbers.items() if stack in published)
    complete = sum(
        held == set(range(count)) for stack, held in numbers.items() for count in published.get(stack, ())
    )
    # Lightning's LoRAs have no prefix and use the older names of the factors.
    bare = any(re.match(r"transformer_blocks\.\d+\.attn\..*lora_down", key) for key in shapes)
    return len(found), sizes, -beyond, complete, bare and family == "qwen_image"


def _dialect(modules: Iterable[str], keys: Iterable[str], unmatched: Iterable[str]) -> str:
    """The name of a LoRA's dialect, after the programs that write it."""
    keys, modules = list(keys), list(modules)

    def some(pattern: str) -> bool:
        return any(re.search(pattern, key) for key in keys)

    if some(r"\.processor\..*_lora[12]?\."):
        return "xlabs"
    if some(r"\.lokr_"):
        return "lokr"
    if some(r"\.hada_"):
        return "loha"
    if some(r"lora_B\.bias$") and any(key.endswith("_norm.scale") for key in unmatched):
        return "control"
    first = next(iter(modules), "")
    for prefix, dialect in (
        ("lora_unet_", "kohya"),
        ("lora_transformer_", "onetrainer"),
        ("lycoris_", "lycoris"),
        ("base_model.", "peft"),
        ("transformer.", "diffusers"),
    ):
        if first.startswith(prefix):
            return dialect
    if first.startswith(("diffusion_model.", "model.diffusion_model.")):
        return "aitoolkit" if some(r"\.lora_A\.") else "comfyui"
    if some(r"\.lora_A\.[^.]+\.weight$"):
        return "peft"
    return "diffusers" if some(r"transformer_blocks\.") else "peft" if some(r"\.lora_A\.") else "kohya"
