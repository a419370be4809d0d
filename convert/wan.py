"""Wan 2.1: official keys (diffusers' layout) beside our parameters."""

from .table import Rule, linear, scale

RULES = (
    *linear("patch_embedding", "patch_in"),
    *linear("condition_embedder.time_embedder.linear_1", "time_in.linear_1"),
    *linear("condition_embedder.time_embedder.linear_2", "time_in.linear_2"),
    *linear("condition_embedder.time_proj", "time_out"),
    *linear("condition_embedder.text_embedder.linear_1", "text_in.linear_1"),
    *linear("condition_embedder.text_embedder.linear_2", "text_in.linear_2"),
    Rule("blocks.{}.scale_shift_table", "blocks.{}.modulation.vectors"),
    # Self-attention
    *linear("blocks.{}.attn1.to_q", "blocks.{}.self_attention.q"),
    *linear("blocks.{}.attn1.to_k", "blocks.{}.self_attention.k"),
    *linear("blocks.{}.attn1.to_v", "blocks.{}.self_attention.v"),
    *scale("blocks.{}.attn1.norm_q", "blocks.{}.self_attention.norm_q"),
    *scale("blocks.{}.attn1.norm_k", "blocks.{}.self_attention.norm_k"),
    *linear("blocks.{}.attn1.to_out.0", "blocks.{}.self_attention.out"),
    # Cross-attention to the text
    *scale("blocks.{}.norm2", "blocks.{}.cross_norm"),
    Rule("blocks.{}.norm2.bias", "blocks.{}.cross_norm.bias"),
    *linear("blocks.{}.attn2.to_q", "blocks.{}.cross_attention.q"),
    *linear("blocks.{}.attn2.to_k", "blocks.{}.cross_attention.k"),
    *linear("blocks.{}.attn2.to_v", "blocks.{}.cross_attention.v"),
    *scale("blocks.{}.attn2.norm_q", "blocks.{}.cross_attention.norm_q"),
    *scale("blocks.{}.attn2.norm_k", "blocks.{}.cross_attention.norm_k"),
    *linear("blocks.{}.attn2.to_out.0", "blocks.{}.cross_attention.out"),
    *linear("blocks.{}.ffn.net.0.proj", "blocks.{}.mlp.linear_1"),
    *linear("blocks.{}.ffn.net.2", "blocks.{}.mlp.linear_2"),
    Rule("scale_shift_table", "modulation_out.vectors"),
    *linear("proj_out", "out"),
)
