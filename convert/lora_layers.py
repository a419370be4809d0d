"""The names of layers in LoRA files. The last part of a key is the tensor's role; the rest names a layer.

Layers have diffusers' names or those of the model's authors. Some programs write underscores instead of dots,
and some add prefixes. So names are looked up in the tables of `layouts` with underscores everywhere, and dots
are never guessed.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cache

from .layout import Layout, Line, Target, split, whole
from .layouts import LAYOUTS, as_published
from .table import Rule

# The role of a tensor, by the end of its key. PEFT puts the adapter's name before `weight`.
ROLES = tuple(
    (role, re.compile(pattern + "$"))
    for role, pattern in (
        ("bias", r"\.lora_(?:B|up)(?:\.[^.]+)?\.bias"),
        ("down", r"\.lora_(?:A|down)(?:(?:\.[^.]+)?\.weight)?"),
        ("up", r"\.lora_(?:B|up)(?:(?:\.[^.]+)?\.weight)?"),
        ("mid", r"\.lora_mid\.weight"),
        ("down", r"(?:\.lora(?:_linear_layer)?)?\.down\.weight"),
        ("up", r"(?:\.lora(?:_linear_layer)?)?\.up\.weight"),
        ("alpha", r"\.alpha"),
        ("dora", r"\.dora_scale|\.lora_magnitude_vector(?:\.[^.]+)*"),
        *((name, rf"\.{name}") for name in ("lokr_t2", "hada_t1", "hada_t2")),
        *((f"lokr_{name}", rf"\.lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")),
        *((f"hada_{name}", rf"\.hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b")),
        ("diff", r"\.(?:diff|w_norm)"),
        ("diff_b", r"\.(?:diff_b|b_norm)"),
        ("diff_m", r"\.diff_m"),
    )
)
# Prefixes of layers' names, with underscores. Any number of them may follow each other.
PREFIXES = (
    "base_model_",
    "model_",
    "diffusion_model_",
    "transformer_",
    "unet_",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "lora_",
    "dit_",
    "net_",
)
# Prefixes of text encoders' layers. They give the encoder's number in the pipeline, from 1.
TEXT = re.compile(
    r"(?:base_model\.model\.)?(?:lora_te(?P<kohya>\d?)[_.]|text_encoder(?:_(?P<diffusers>\d))?\.|te(?P<short>\d?)\.|"
    r"text_encoders\.(?P<comfy>\w+)\.(?:transformer\.)?)"
)
# Layers of XLabs' LoRAs for FLUX.1, which change the outputs of an attention's projections (XLabs-AI/x-flux).
XLABS = Layout(
    "xlabs",
    (
        *(
            line
            for number, (projections, out) in enumerate(
                (
                    (("to_q", "to_k", "to_v"), "to_out.0"),
                    (("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out"),
                ),
                1,
            )
            for line in (
                split(
                    f"double_blocks.{{}}.processor.qkv_lora{number}",
                    *(f"transformer_blocks.{{}}.attn.{name}" for name in projections),
                ),
                whole(
                    f"double_blocks.{{}}.processor.proj_lora{number}", f"transformer_blocks.{{}}.attn.{out}"
                ),
            )
        ),
        split(
            "single_blocks.{}.processor.qkv_lora",
            *(f"single_transformer_blocks.{{}}.attn.{name}" for name in ("to_q", "to_k", "to_v")),
        ),
        whole("single_blocks.{}.processor.proj_lora", "single_transformer_blocks.{}.proj_out"),
    ),
)
NUMBER = re.compile(r"(?<=_)[0-9]+(?=_|$)")
# A modulation of Wan's blocks is not a layer but a parameter of the block.
BARE = ("_modulation", "_scale_shift_table")


def role_of(key: str) -> tuple[str, str] | None:
    """The name of the layer to which a tensor belongs, and the tensor's role there. None if it is not part of
    a LoRA.
    """
    for role, ending in ROLES:
        if found := ending.search(key):
            return key[: found.start()], role
    return None


def text_encoder(name: str) -> tuple[int, str] | None:
    """The number of the text encoder to which a layer belongs, from 1, and the layer's name there. None if it
    belongs to no text encoder.
    """
    found = TEXT.match(name)
    if found is None:
        return None
    number = next((n for n in (found["kohya"], found["diffusers"], found["short"]) if n), "1")
    if found["comfy"]:
        number = "2" if found["comfy"].startswith("t5") else "1"
    return int(number), name[found.end() :]


class Names:
    """The layers of a family, under all names that LoRA files use."""

    def __init__(self, layouts: Iterable[Layout]):
        # Lines by name with underscores. No two different lines share such a name.
        self._lines: dict[str, tuple[str, Line]] = {}
        for layout in layouts:
            for line in layout.lines:
                if line.targets:
                    self._lines.setdefault(line.name.replace(".", "_"), (layout.name, line))

    def find(self, name: str, suffix: str) -> tuple[str, tuple[Target, ...]] | None:
        """The name of the layout that has the layer `name`, and diffusers' tensors in the layer's tensor
        `suffix` ("weight", "bias", or "" for a modulation). None if the family has no such layer.
        """
        for flat in _readings(name.replace(".", "_")):
            for ending, added in _endings(suffix):
                for template, number in _templates(flat + ending):
                    if template in self._lines:
                        layout, line = self._lines[template]
                        return layout, tuple(
                            Target(target.key.replace("{}", number) + added, target.parts, target.units)
                            for target in line.targets
                        )
        return None


def names_of(family: str, rules: Iterable[Rule] = ()) -> Names:
    """The `Names` of a family. If its layouts are not known, they come from the conversion `rules`."""
    return _known(family) if family in LAYOUTS else Names([as_published(rules)])


@cache
def _known(family: str) -> Names:
    return Names((*LAYOUTS[family], *([XLABS] if family == "flux1" else [])))


def _endings(suffix: str) -> Iterator[tuple[str, str]]:
    """Pairs of endings: one after a layer's name to find its tensor in a table, the other after the key in
    the table.
    """
    if not suffix:
        yield from ((ending, "") for ending in BARE)
        return
    yield "", f".{suffix}"
    yield f"_{suffix}", ""
    if suffix == "weight":
        yield "_scale", ""


def _readings(flat: str) -> Iterator[str]:
    """`flat`, and `flat` without parts that may stand before a layer's name or within it."""
    yield flat
    if "_processor_" in flat:
        yield from _readings(flat.replace("_processor_", "_"))
    if flat.endswith("_lora"):
        yield from _readings(flat.removesuffix("_lora"))
    if flat.endswith("_to_out"):
        yield f"{flat}_0"
    for prefix in PREFIXES:
        if flat.startswith(prefix):
            yield from _readings(flat[len(prefix) :])


def _templates(flat: str) -> Iterator[tuple[str, str]]:
    """Forms of `flat` that a table may hold, each with the layer's number, or "" if there is none."""
    yield flat, ""
    if number := NUMBER.search(flat):
        yield f"{flat[: number.start()]}{{}}{flat[number.end() :]}", number[0]
