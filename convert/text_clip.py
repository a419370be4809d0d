"""CLIP's text model: official keys (transformers' layout) beside our parameters."""

from collections.abc import Iterable, Iterator

from .table import Rule, linear
from .text_names import rename

LAYER = "encoder.layers.{}"


def norm(official: str, path: str) -> Iterator[Rule]:
    """The rules of a norm with scale and bias."""
    yield Rule(f"{official}.weight", f"{path}.scale")
    yield Rule(f"{official}.bias", f"{path}.bias")


RULES = (
    Rule("embeddings.token_embedding.weight", "embedding.embedding"),
    Rule("embeddings.position_embedding.weight", "positions.embedding"),
    *norm(f"{LAYER}.layer_norm1", "blocks.{}.norm_attention"),
    *linear(f"{LAYER}.self_attn.q_proj", "blocks.{}.attention.q"),
    *linear(f"{LAYER}.self_attn.k_proj", "blocks.{}.attention.k"),
    *linear(f"{LAYER}.self_attn.v_proj", "blocks.{}.attention.v"),
    *linear(f"{LAYER}.self_attn.out_proj", "blocks.{}.attention.out"),
    *norm(f"{LAYER}.layer_norm2", "blocks.{}.norm_mlp"),
    *linear(f"{LAYER}.mlp.fc1", "blocks.{}.linear_1"),
    *linear(f"{LAYER}.mlp.fc2", "blocks.{}.linear_2"),
    *norm("final_layer_norm", "norm"),
)
# The prefix of the keys in all but the newest files.
PREFIX = "text_model."
# Beginnings of other keys: indices of positions, the projections that compare texts with pictures, the vision
# tower.
UNREAD = ("embeddings.position_ids", "text_projection.", "logit_scale", "visual_projection.", "vision_model.")


def names(keys: Iterable[str]) -> dict[str, str]:
    """The stored key of each name in `RULES`."""

    def name_of(key: str) -> str | None:
        name = key.removeprefix(PREFIX)
        return None if name.startswith(UNREAD) else name

    return rename(keys, name_of)
