"""Decoder-only language models: official keys (transformers' layout) beside our parameters."""

import re
from collections.abc import Iterable

from .table import Rule, linear, matrix, scale
from .text_names import rename

LAYER = "layers.{}"
RULES = (
    Rule("embed_tokens.weight", "embedding.embedding"),
    *scale(f"{LAYER}.input_layernorm", "blocks.{}.norm_attention"),
    *linear(f"{LAYER}.self_attn.q_proj", "blocks.{}.attention.q"),
    *linear(f"{LAYER}.self_attn.k_proj", "blocks.{}.attention.k"),
    *linear(f"{LAYER}.self_attn.v_proj", "blocks.{}.attention.v"),
    *linear(f"{LAYER}.self_attn.o_proj", "blocks.{}.attention.out"),
    *scale(f"{LAYER}.self_attn.q_norm", "blocks.{}.norm_q"),
    *scale(f"{LAYER}.self_attn.k_norm", "blocks.{}.norm_k"),
    *scale(f"{LAYER}.post_attention_layernorm", "blocks.{}.norm_mlp"),
    *matrix(f"{LAYER}.mlp.gate_proj", "blocks.{}.mlp.gate"),
    *matrix(f"{LAYER}.mlp.up_proj", "blocks.{}.mlp.up"),
    *matrix(f"{LAYER}.mlp.down_proj", "blocks.{}.mlp.down"),
    *scale("norm", "norm"),
)
# The prefix of the keys: none, `model.`, `language_model.`, or both in either order, since the names have
# changed.
PREFIX = re.compile(r"(model\.|language_model\.)*")
# The layers that predict the next token, and those that read pictures.
UNREAD = ("lm_head.", "visual.", "vision_tower.", "multi_modal_projector.")


def names(keys: Iterable[str], built: int, layers: int) -> dict[str, str]:
    """The stored key of each name in `RULES`. Of `layers` layers only the first `built` are read; the last
    norm is read only with all of them.
    """
    numbers = range(built, layers)
    unread = (*UNREAD, *(f"{LAYER.format(number)}." for number in numbers), *(["norm."] if numbers else []))

    def name_of(key: str) -> str | None:
        name = PREFIX.sub("", key, count=1)
        return None if name.startswith(unread) else name

    return rename(keys, name_of)
