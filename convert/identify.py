"""Identifies a file of weights by its tensors' names and shapes, never by its file name.

Files differ in the prefix of all names (`model.diffusion_model.` in ComfyUI's, `transformer.`, none), in the
layout, and in the other components that they hold. The prefix and the layout that fit the most names are
chosen.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .layout import NUMBER, Layout, Target
from .layouts import LAYOUTS, TITLES

# Prefixes of the other components in a whole checkpoint.
BESIDE = re.compile(
    r"(text_encoders|text_encoder\w*|cond_stage_model|conditioner|clip\w*|vae|first_stage_model|te\d?)\."
)
# Tensors that all transformers of a family have and that no other family has, in diffusers' names.
MARKS = {
    "flux1": (
        "x_embedder.weight",
        "context_embedder.weight",
        "time_text_embed.text_embedder.linear_1.weight",
    ),
    "flux2": ("x_embedder.weight", "context_embedder.weight", "double_stream_modulation_img.linear.weight"),
    "qwen_image": ("img_in.weight", "txt_in.weight", "txt_norm.weight"),
    "wan": (
        "patch_embedding.weight",
        "scale_shift_table",
        "condition_embedder.text_embedder.linear_1.weight",
    ),
    "z_image": ("all_x_embedder.2-1.weight", "cap_embedder.1.weight", "cap_pad_token"),
}
# Other models of each family, by tensors that only they have.
OTHERS = {
    "flux1": {r"control": "a ControlNet", r"redux": "FLUX.1 Redux"},
    "flux2": {r"control": "a ControlNet"},
    "qwen_image": {r"addition_t_embedding": "Qwen-Image-Layered", r"control": "a ControlNet"},
    "wan": {
        r"k_img|v_img|img_emb|add_k_proj|add_v_proj|image_embedder|norm_added_k": "Wan image-to-video",
        r"vace": "Wan VACE",
        r"control|ref_conv": "Wan with control",
    },
    "z_image": {r"control": "a ControlNet", r"siglip": "Z-Image Omni"},
}
# Other Wan models, by the number of channels that they read.
WAN_CHANNELS = {(36,): "Wan image-to-video", (48,): "Wan 2.2 TI2V-5B"}
# Other kinds of files; the first that fits is chosen.
KINDS = {
    "lora": re.compile(
        r"[._]lora(_linear_layer)?\.(down|up)\.|\.lora_(A|B|down|up)\b|_lora[12]?\.(down|up)\."
        r"|\.(lokr_w[12]|lokr_t2|hada_[wt][12])|\.dora_scale$|\.lora_magnitude_vector|\.diff(_b|_m)?$"
        r"|^lora_(A|B|down|up)\."
    ),
    "vae": re.compile(r"(^|\.)(encoder|decoder)\.(conv_in|conv1)\.(weight|bias)$"),
    "text_encoder": re.compile(
        r"(^|\.)(embed_tokens|shared|token_embedding)\.weight$|(^|\.)(self_attn\.q_proj|SelfAttention\.q)\.weight$"
    ),
}
# A prefix has fewer parts than this.
DEPTH = 4


@dataclass(frozen=True)
class Transformer:
    """A transformer in a file.

    `prefix` stands before all its names in `layout`. `targets` says which of diffusers' tensors each stored
    tensor holds. `unmatched` are names that no transformer of the family has; `beside` are those of other
    components.
    """

    family: str
    layout: Layout
    prefix: str
    targets: Mapping[str, tuple[Target, ...]]
    unmatched: tuple[str, ...]
    beside: tuple[str, ...]


def find_transformer(
    keys: Iterable[str], layouts: Mapping[str, tuple[Layout, ...]] = LAYOUTS
) -> Transformer | None:
    """The transformer, or the part of one, that tensors of these names form. None if it belongs to none of
    the families in `layouts`.
    """
    keys = sorted(keys)
    best = max(_readings(keys, layouts), key=lambda reading: reading[0], default=None)
    if best is None:
        return None
    _, family, layout, prefix = best
    targets, unmatched, beside = {}, [], []
    for key in keys:
        found = layout.targets(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if found is not None:
            targets[key] = found
        elif BESIDE.match(key):
            beside.append(key)
        else:
            unmatched.append(key)
    present = {target.key for held in targets.values() for target in held}
    # A shard may lack some marks, but then it has no unknown tensors.
    if unmatched and not present.issuperset(MARKS.get(family, ())):
        return None
    return Transformer(family, layout, prefix, targets, tuple(unmatched), tuple(beside))


def refusal(found: Transformer, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why jaxspd cannot run a transformer whose tensors in diffusers' layout have these `shapes`: it is not a
    text-to-image or text-to-video model of its family. None if it can.
    """
    title = TITLES.get(found.family, found.family)
    for pattern, model in OTHERS.get(found.family, {}).items():
        if any(re.search(pattern, key) for key in found.unmatched):
            return f"it is {model}; jaxspd runs {title} from text alone"
    if found.family == "flux1":
        inputs, outputs = shapes.get("x_embedder.weight"), shapes.get("proj_out.weight")
        if inputs and outputs and len(inputs) == 2 and inputs[1] != outputs[0]:
            return (
                f"it reads {inputs[1]} channels and makes {outputs[0]}, as FLUX.1 Fill, Canny and Depth do, "
                "which need a picture; jaxspd runs FLUX.1 from text alone"
            )
    if found.family == "wan":
        channels = shapes.get("patch_embedding.weight", (0, 0))[1:2]
        if channels in WAN_CHANNELS:
            return f"it is {WAN_CHANNELS[channels]}; jaxspd runs Wan from text alone"
    if found.unmatched:
        return f"{len(found.unmatched)} tensors are none of {title}'s: {three(found.unmatched)}"
    return None


def three(names: Iterable[str]) -> str:
    """Up to three of `names`, for a message."""
    names = sorted(names)
    return ", ".join(name if len(name) <= 80 else f"{name[:80]}…" for name in names[:3]) + (
        ", …" if len(names) > 3 else ""
    )


def kind_of(keys: Iterable[str]) -> str | None:
    """What tensors of these names belong to, if not to a transformer: lora, vae or text_encoder. None if that
    is not known.
    """
    keys = list(keys)
    return next((kind for kind, names in KINDS.items() if any(map(names.search, keys))), None)


def _readings(
    keys: list[str], layouts: Mapping[str, tuple[Layout, ...]]
) -> Iterable[tuple[tuple, str, Layout, str]]:
    """A score for each prefix and layout, followed by the family, the layout and the prefix. The score is
    first the number of names that the layout knows.
    """
    counts: dict[str, Counter] = {}
    for key in keys:
        for prefix in _prefixes(key):
            # One name stands for all names that differ only in the layer's number.
            counts.setdefault(prefix, Counter())[NUMBER.sub("0", key[len(prefix) :], count=1)] += 1
    for prefix, forms in counts.items():
        for family, own in layouts.items():
            for layout in own:
                known = {form: found for form in forms if (found := layout.targets(form)) is not None}
                if known:
                    marks = sum(
                        target.key in MARKS.get(family, ()) for found in known.values() for target in found
                    )
                    score = sum(forms[form] for form in known), marks, -len(prefix)
                    yield score, family, layout, prefix


def _prefixes(key: str) -> Iterable[str]:
    """Possible prefixes of a name: none, or some of its first parts, without numbers."""
    yield ""
    parts = key.split(".")
    for depth in range(1, min(DEPTH, len(parts))):
        if parts[depth - 1].isdigit():
            return
        yield ".".join(parts[:depth]) + "."
