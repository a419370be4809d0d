"""What a file of weights is, told by its tensors' names and shapes, never by its own name.

Files differ in what lies before the names (`model.diffusion_model.` in ComfyUI's, `transformer.`, nothing),
in the layout, and in what else they hold. The prefix and the layout are chosen that know most of the names.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .layout import NUMBER, Layout, Target
from .layouts import LAYOUTS, TITLES

# Where whole checkpoints keep what is not the transformer's.
BESIDE = re.compile(
    r"(text_encoders|text_encoder\w*|cond_stage_model|conditioner|clip\w*|vae|first_stage_model|te\d?)\."
)
# Tensors that all transformers of a family have and no other family's, as diffusers calls them.
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
# Other models of the families, by tensors that only these have.
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
# By how many channels they read.
WAN_CHANNELS = {(36,): "Wan image-to-video", (48,): "Wan 2.2 TI2V-5B"}
# What other files hold, the first that fits.
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
# As long as the names of tensors that stand in front of everything can be.
DEPTH = 4


@dataclass(frozen=True)
class Transformer:
    """A transformer in a file: its family, its `layout`, the `prefix` before all its names, and what each of
    these stands for; `unmatched` are names that no such transformer has, `beside` those of other components.
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
    """The transformer that tensors of these names make up, or a part of it; None if it is of none of the
    families in `layouts`.
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
    # A shard has not all the marks, but nothing else either.
    if unmatched and not present.issuperset(MARKS.get(family, ())):
        return None
    return Transformer(family, layout, prefix, targets, tuple(unmatched), tuple(beside))


def refusal(found: Transformer, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why a transformer, whose tensors in diffusers' layout have these `shapes`, is not one that works from
    text alone; None if it is.
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
    """What tensors of these names are part of, if not a transformer: lora, vae or text_encoder; None if that
    is not known.
    """
    keys = list(keys)
    return next((kind for kind, names in KINDS.items() if any(map(names.search, keys))), None)


def _readings(
    keys: list[str], layouts: Mapping[str, tuple[Layout, ...]]
) -> Iterable[tuple[tuple, str, Layout, str]]:
    """How much each prefix and layout makes of the names: how many it knows."""
    counts: dict[str, Counter] = {}
    for key in keys:
        for prefix in _prefixes(key):
            # One name stands for all that differ in the layer's number.
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
    """What may stand in front of a name: nothing, or some of its first parts, which are no numbers."""
    yield ""
    parts = key.split(".")
    for depth in range(1, min(DEPTH, len(parts))):
        if parts[depth - 1].isdigit():
            return
        yield ".".join(parts[:depth]) + "."
