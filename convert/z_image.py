"""Z-Image: official keys (diffusers' layout) beside our parameters."""

from collections.abc import Iterator

from .table import Rule, linear, matrix, scale


def blocks(official: str, path: str) -> Iterator[Rule]:
    """The rules of a stack of blocks, without modulation."""
    for theirs, ours in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "out")):
        yield from matrix(f"{official}.attention.{theirs}", f"{path}.{ours}")
    for theirs, ours in (
        ("attention.norm_q", "norm_q"),
        ("attention.norm_k", "norm_k"),
        ("attention_norm1", "norm_attention_in"),
        ("attention_norm2", "norm_attention_out"),
        ("ffn_norm1", "norm_mlp_in"),
        ("ffn_norm2", "norm_mlp_out"),
    ):
        yield from scale(f"{official}.{theirs}", f"{path}.{ours}")
    for theirs, ours in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
        yield from matrix(f"{official}.feed_forward.{theirs}", f"{path}.mlp.{ours}")


RULES = (
    *linear("all_x_embedder.2-1", "image_in"),
    Rule("x_pad_token", "image_padding"),
    *scale("cap_embedder.0", "text_norm"),
    *linear("cap_embedder.1", "text_in"),
    Rule("cap_pad_token", "text_padding"),
    *linear("t_embedder.mlp.0", "time_in.linear_1"),
    *linear("t_embedder.mlp.2", "time_in.linear_2"),
    # Image tokens only
    *blocks("noise_refiner.{}", "image_blocks.{}"),
    *linear("noise_refiner.{}.adaLN_modulation.0", "image_blocks.{}.modulation"),
    # Text tokens only, independent of the noise level
    *blocks("context_refiner.{}", "text_blocks.{}"),
    # Both together
    *blocks("layers.{}", "blocks.{}"),
    *linear("layers.{}.adaLN_modulation.0", "blocks.{}.modulation"),
    *linear("all_final_layer.2-1.adaLN_modulation.1", "modulation_out"),
    *linear("all_final_layer.2-1.linear", "out"),
)
