"""The encoders of T5 and UMT5: official keys (transformers' layout, and Wan's own) beside our parameters."""

from collections.abc import Iterable

from .table import Rule, matrix, scale
from .text_names import rename

BLOCK = "encoder.block.{}"
BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"
RULES = (
    Rule("shared.weight", "embedding.embedding"),
    # The position bias: the first block's, which all blocks share, or one per block
    Rule(f"encoder.block.0.{BIAS}", "bias.table.embedding"),
    Rule(f"{BLOCK}.{BIAS}", "blocks.{}.bias.table.embedding"),
    *scale(f"{BLOCK}.layer.0.layer_norm", "blocks.{}.norm_attention"),
    *matrix(f"{BLOCK}.layer.0.SelfAttention.q", "blocks.{}.attention.q"),
    *matrix(f"{BLOCK}.layer.0.SelfAttention.k", "blocks.{}.attention.k"),
    *matrix(f"{BLOCK}.layer.0.SelfAttention.v", "blocks.{}.attention.v"),
    *matrix(f"{BLOCK}.layer.0.SelfAttention.o", "blocks.{}.attention.out"),
    *scale(f"{BLOCK}.layer.1.layer_norm", "blocks.{}.norm_mlp"),
    # MLPs with gates and without
    *matrix(f"{BLOCK}.layer.1.DenseReluDense.wi_0", "blocks.{}.mlp.gate"),
    *matrix(f"{BLOCK}.layer.1.DenseReluDense.wi_1", "blocks.{}.mlp.up"),
    *matrix(f"{BLOCK}.layer.1.DenseReluDense.wo", "blocks.{}.mlp.down"),
    *matrix(f"{BLOCK}.layer.1.DenseReluDense.wi", "blocks.{}.mlp.linear_1"),
    *matrix(f"{BLOCK}.layer.1.DenseReluDense.wo", "blocks.{}.mlp.linear_2"),
    *scale("encoder.final_layer_norm", "norm"),
)
# UMT5 as Wan's authors name it
WAN_RULES = (
    Rule("token_embedding.weight", "embedding.embedding"),
    Rule("blocks.{}.pos_embedding.embedding.weight", "blocks.{}.bias.table.embedding"),
    *scale("blocks.{}.norm1", "blocks.{}.norm_attention"),
    *matrix("blocks.{}.attn.q", "blocks.{}.attention.q"),
    *matrix("blocks.{}.attn.k", "blocks.{}.attention.k"),
    *matrix("blocks.{}.attn.v", "blocks.{}.attention.v"),
    *matrix("blocks.{}.attn.o", "blocks.{}.attention.out"),
    *scale("blocks.{}.norm2", "blocks.{}.norm_mlp"),
    *matrix("blocks.{}.ffn.gate.0", "blocks.{}.mlp.gate"),
    *matrix("blocks.{}.ffn.fc1", "blocks.{}.mlp.up"),
    *matrix("blocks.{}.ffn.fc2", "blocks.{}.mlp.down"),
    *scale("norm", "norm"),
)
# The embedding's second name. Files may hold it under both names.
EMBEDDING, AGAIN = "shared.weight", "encoder.embed_tokens.weight"
# The other half of a whole T5.
UNREAD = ("decoder.", "lm_head.")


def rules_for(keys: Iterable[str]) -> tuple[Rule, ...]:
    """The table of the layout to which `keys` belong."""
    return WAN_RULES if "token_embedding.weight" in keys else RULES


def names(keys: Iterable[str]) -> dict[str, str]:
    """The stored key of each name in the tables."""
    stored = set(keys)

    def name_of(key: str) -> str | None:
        if key.startswith(UNREAD) or (key == AGAIN and EMBEDDING in stored):
            return None
        return EMBEDDING if key == AGAIN else key

    return rename(stored, name_of)
