"""Recognises VAEs and text encoders by the names of their tensors: family, layout, and which tensors are
known.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from . import text_clip, text_decoder, text_t5, vae_image, vae_video
from .errors import UsageError
from .identify import three
from .layouts import as_published

# Prefixes of a component's names in a whole checkpoint.
PREFIX = re.compile(
    r"(vae|first_stage_model|(text_encoders?|cond_stage_model|conditioner)(\.\w+?)?(\.transformer)?)\."
)
# Names in the authors' layouts: autoencoders of images (CompVis' latent diffusion; FLUX.2's has statistics
# too), and Wan's autoencoder of videos.
BLOCK = r"(norm[12]|conv[12]|nin_shortcut)"
LDM = re.compile(
    rf"(encoder|decoder)\.(conv_in|conv_out|norm_out|mid\.block_[12]\.{BLOCK}"
    r"|mid\.attn_1\.(norm|q|k|v|proj_out)"
    rf"|(down|up)\.\d+\.(block\.\d+\.{BLOCK}|(downsample|upsample)\.conv))\.(weight|bias)"
    r"|((encoder|decoder)\.)?(post_)?quant_conv\.(weight|bias)|bn\.(running_mean|running_var|num_batches_tracked)"
)
PIECE = r"(residual\.[0-9]\.(gamma|weight|bias)|shortcut\.(weight|bias))"
WAN = re.compile(
    r"conv[12]\.(weight|bias)|(encoder|decoder)\.(conv1\.(weight|bias)|head\.[02]\.(gamma|weight|bias)"
    rf"|middle\.\d\.({PIECE}|norm\.gamma|(to_qkv|proj)\.(weight|bias))"
    rf"|(downsamples|upsamples)\.\d+\.({PIECE}|resample\.1\.(weight|bias)|time_conv\.(weight|bias)))"
)


class Names(NamedTuple):
    """What is known about a component's tensors. `matched` and `unmatched` are stored names; `refused` is why
    jaxspd cannot use it.
    """

    family: str | None
    variant: str | None
    layout: str
    matched: list[str]
    unmatched: list[str]
    refused: str | None


def bare(key: str) -> str:
    """`key` without a component's prefix."""
    match = PREFIX.match(key)
    return key[match.end() :] if match else key


def vae_names(keys: Collection[str]) -> Names:
    """The names of a VAE's tensors. The layout tells the family; only FLUX.2's has running statistics."""
    names = {key: bare(key) for key in keys}
    inside = set(names.values())
    known: Callable[[str], Any]
    if any(name.startswith("decoder.upsamples.") or name == "encoder.conv1.weight" for name in inside):
        family, layout, known = "wan", "wan", WAN.fullmatch
    elif any(".mid.block_1." in name for name in inside):
        layout, known = "ldm", LDM.fullmatch
        family = "flux2" if "bn.running_mean" in inside else "flux1"
    elif any(name.endswith(".gamma") for name in inside):
        family, layout = "wan", "diffusers"
        residuals = _count(inside, r"decoder\.up_blocks\.0\.resnets\.") - 1
        rules = vae_video.rules(_count(inside, r"decoder\.up_blocks\."), max(residuals, 0))
        known = as_published(rules).targets
    else:
        family, layout = "flux2" if "bn.running_mean" in inside else "flux1", "diffusers"
        depth = _count(inside, r"encoder\.down_blocks\.")
        rules = vae_image.rules(depth, _count(inside, r"encoder\.down_blocks\.0\.resnets\."))
        table = as_published(rules)

        def known(name: str) -> bool:
            return name in vae_image.UNREAD or bool(table.targets(name))

    matched = [key for key, name in names.items() if known(name)]
    unmatched = [key for key in keys if key not in set(matched)]
    stray = "quant_conv.weight" in inside and family == "flux1"
    refused = "it is the VAE of another model, such as Stable Diffusion" if stray else _strangers(unmatched)
    return Names(
        family, "also Qwen-Image's" if family == "wan" else None, layout, matched, unmatched, refused
    )


def text_encoder_names(keys: Collection[str], shape: Callable[[str], tuple[int, ...]]) -> Names:
    """The names of a text encoder's tensors. The kind of encoder and its width tell the family."""
    stored = {bare(key): key for key in keys}
    layout = "transformers"
    family: str
    variant: str
    renamed: Callable[[Collection[str]], Mapping[str, str]]
    if "token_embedding.weight" in stored or "shared.weight" in stored or _some(stored, "SelfAttention.q"):
        rules, renamed = text_t5.rules_for(stored), text_t5.names
        layout = "wan" if rules is text_t5.WAN_RULES else layout
        last = [name for name in stored if "relative_attention_bias" in name or "pos_embedding" in name]
        family, variant = ("wan", "UMT5") if len(last) > 1 else ("flux1", "T5")
    elif any(text_clip.names([name]).keys() & {"embeddings.token_embedding.weight"} for name in stored):
        rules, renamed = text_clip.RULES, text_clip.names
        family, variant = "flux1", "CLIP"
    else:
        rules = text_decoder.RULES

        def renamed(names):
            return text_decoder.names(names, 0, 0)

        tokens = next((key for name, key in stored.items() if name.endswith("embed_tokens.weight")), None)
        width = shape(tokens)[-1] if tokens and shape(tokens) else 0
        if _some(stored, "self_attn.q_norm"):
            family, variant = (
                ("flux2", "Qwen3 8B") if width == 4096 else ("z_image", "Qwen3, also klein 4B's")
            )
        elif any(name.endswith("self_attn.q_proj.bias") for name in stored):
            family, variant = "qwen_image", "Qwen2.5-VL"
        else:
            family, variant = "flux2", "Mistral 3"
    try:
        named = renamed(stored)
    except UsageError as error:
        return Names(family, variant, layout, [], sorted(keys), str(error))
    table = as_published(rules)
    strangers = [stored[key] for name, key in named.items() if table.targets(name) is None]
    matched = [key for key in keys if key not in set(strangers)]
    return Names(family, variant, layout, matched, strangers, _strangers(strangers))


def _some(names: Collection[str], part: str) -> bool:
    return any(part in name for name in names)


def _count(names: Collection[str], before: str) -> int:
    """One more than the highest number after `before`, a regular expression; 0 if there is none."""
    found = (re.match(before + r"([0-9]{1,3})\.", name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _strangers(unmatched: Collection[str]) -> str | None:
    return f"{len(unmatched)} tensors are not known: {three(unmatched)}" if unmatched else None
