"""The names in a LoRA's file: which layer of which family each tensor changes, and what part it plays.

Every trainer has its own way to write them: what stands before a layer's name, whether its dots are kept or
became `_`, whether it is a layer of diffusers or of the model's authors, and what the factors are called.
Where the dots of a flattened name were is not guessed, but looked up among the layers that there are.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from .layout import NUMBER, Layout
from .layouts import LAYOUTS

# What follows a layer's name, and the part that it says: down, up, alpha, …
SUFFIX = re.compile(
    r"\.lora_(?P<factor>A|B|down|up|mid)(\.(?!weight$|bias$)[^.]+)?(\.(?P<leaf>weight|bias))?$"
    r"|[._]lora(_linear_layer)?\.(?P<old>down|up)\.weight$"
    r"|\.(?P<other>alpha|dora_scale|lokr_(w[12](_[ab])?|t2)|hada_(w[12]_[ab]|t[12])|diff(_b|_m)?"
    r"|lora_magnitude_vector)(\.(?!weight$)[^.]+)?(\.weight)?$"
)
PARTS = {"A": "down", "B": "up"}
# XLabs' names for the attention of FLUX.1's blocks; the first LoRA is the picture's, the second the text's.
XLABS = re.compile(
    r"(?P<block>.*double_blocks\.[0-9]+)\.processor\.(?P<layer>qkv|proj)_lora(?P<stream>[12])$"
)
XLABS_SUFFIX = re.compile(r"(?P<module>.*_lora[12])\.(?P<part>down|up)\.weight$")
STREAMS = {"1": "img_attn", "2": "txt_attn"}
# What is trained beside the transformer.
TEXT = re.compile(r"(lora_)?(te[0-9]*|text_encoders?|text_encoder_[0-9]|clip\w*|t5xxl|text_model)[._]")
# Layers that have two names in diffusers' own layout.
AGAIN = ((".to.", ".to_"), (".to_out", ".to_out.0"))
# How many numbers of blocks the published models have.
BLOCKS = {
    "flux1": {"transformer_blocks": {19}, "single_transformer_blocks": {38}},
    "flux2": {"transformer_blocks": {5, 8}, "single_transformer_blocks": {20, 24, 48}},
    "qwen_image": {"transformer_blocks": {60}},
    "wan": {"blocks": {30, 40}},
    "z_image": {"layers": {30}},
}
# How many outputs some layers have for each input, where the families differ.
WIDENING = {
    "flux1": {".proj_mlp": 4, ".ff.net.0.proj": 4},
    "flux2": {".to_qkv_mlp_proj": 9, ".ff.linear_in": 6, ".ff_context.linear_in": 6},
    "qwen_image": {".img_mlp.net.0.proj": 4, ".txt_mlp.net.0.proj": 4},
}


@dataclass(frozen=True)
class LoraNames:
    """The layers that a LoRA changes, of `family` in `layout`: layer -> part -> key. `dialect` is the way in
    which they are written; `text` are keys of text encoders, `unmatched` those of no layer.
    """

    family: str
    layout: Layout
    dialect: str
    modules: Mapping[str, Mapping[str, str]]
    text: tuple[str, ...]
    unmatched: tuple[str, ...]


def parse(shapes: Mapping[str, tuple[int, ...]]) -> LoraNames | None:
    """What a LoRA with tensors of these `shapes` changes; None if that is no family's transformer."""
    text = sorted(key for key in shapes if TEXT.match(key))
    named: dict[str, dict[str, str]] = {}
    unmatched = []
    for key in sorted(shapes.keys() - set(text)):
        module, part = _taken_apart(key)
        if part is None or part in named.get(module, ()):
            unmatched.append(key)
        else:
            named.setdefault(module, {})[part] = key
    readings = []
    for family, layouts in LAYOUTS.items():
        for layout in layouts:
            found = {name: module for name in named if (module := layer_called(name, layout))}
            if found:
                modules = {found[name]: parts for name, parts in named.items() if name in found}
                readings.append((_score(family, layout, modules, shapes), family, layout, found))
    if not readings:
        return None
    _, family, layout, found = max(readings, key=lambda reading: reading[0])
    modules: dict[str, Mapping[str, str]] = {}
    for name, parts in named.items():
        if name not in found or found[name] in modules:
            unmatched.extend(parts.values())
        else:
            modules[found[name]] = parts
    dialect = _dialect(named, shapes.keys(), unmatched)
    return LoraNames(family, layout, dialect, modules, tuple(text), tuple(sorted(unmatched)))


def _taken_apart(key: str) -> tuple[str, str | None]:
    """The name of a layer as the file has it, and the part that the tensor plays, None if it is no part."""
    if match := XLABS_SUFFIX.match(key):
        return match["module"], match["part"]
    match = SUFFIX.search(key)
    if not match:
        return key, None
    part = match["factor"] or match["old"] or match["other"]
    part = PARTS.get(part, part)
    if part == "diff_m":  # what a block adds to its modulation, a parameter without a layer
        return f"{key[: match.start()]}.modulation", "diff"
    return key[: match.start()], "bias" if match["leaf"] == "bias" else part


def layer_called(name: str, layout: Layout) -> str | None:
    """The layer that a LoRA's file calls `name`, without what stands before it; None if there is none."""
    if match := XLABS.match(name):
        name = f"{match['block']}.{STREAMS[match['stream']]}.{match['layer']}"
    for tail in _tails(name):
        if tail in layout.layers or _numbered(tail) in layout.layers:
            return tail
        for old, new in AGAIN:
            changed = tail.replace(old, new) if old.endswith(".") else tail.removesuffix(old) + new
            if (changed != tail) and (old in tail) and _numbered(changed) in layout.layers:
                return changed
    flat = name.replace(".", "_")
    for tail in _tails(flat, "_"):
        for number in (None, *re.finditer(r"(?<=_)[0-9]{1,3}(?=_|$)", tail)):
            template = tail if number is None else f"{tail[: number.start()]}{{}}{tail[number.end() :]}"
            if template in layout.flattened:
                return layout.flattened[template].replace("{}", number[0] if number else "")
    return None


def _tails(name: str, separator: str = ".") -> Iterator[str]:
    """`name` itself, and what is left of it without its first parts."""
    parts = name.split(separator)
    for start in range(min(4, len(parts))):
        yield separator.join(parts[start:])


def _numbered(name: str) -> str:
    """`name` with `{}` for its layer's number."""
    return NUMBER.sub("{}", name, count=1)


def _score(
    family: str,
    layout: Layout,
    modules: Mapping[str, Mapping[str, str]],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple:
    """How well a family and a layout explain a LoRA: names first, then sizes, then numbers of blocks."""
    sizes, numbers = 0, {}
    for module, parts in modules.items():
        targets = layout.targets(f"{module}.weight") or layout.targets(module) or ()
        for target in targets:
            stack, *rest = target.key.split(".")
            if rest and rest[0].isdecimal():
                numbers.setdefault(stack, set()).add(int(rest[0][:6]))
            up, down = (shapes.get(parts.get(part, ""), ()) for part in ("up", "down"))
            for name, ratio in WIDENING.get(family, {}).items():
                if target.key.endswith(f"{name}.weight") and len(up) == len(down) == 2:
                    held = up[0] * len(target.parts) // target.units
                    sizes += 1 if held == ratio * down[1] else -1
    published = BLOCKS.get(family, {})
    beyond = sum(max(held) >= max(published[stack]) for stack, held in numbers.items() if stack in published)
    complete = sum(
        held == set(range(count)) for stack, held in numbers.items() for count in published.get(stack, ())
    )
    # Lightning's LoRAs have no prefix, and the older names of the factors.
    bare = any(re.match(r"transformer_blocks\.\d+\.attn\..*lora_down", key) for key in shapes)
    return len(modules), sizes, -beyond, complete, bare and family == "qwen_image"


def _dialect(modules: Iterable[str], keys: Iterable[str], unmatched: Iterable[str]) -> str:
    """What the way in which a LoRA is written is called, by who writes so."""
    keys, modules = list(keys), list(modules)

    def some(pattern: str) -> bool:
        return any(re.search(pattern, key) for key in keys)

    if any(map(XLABS.match, modules)):
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
