"""FLUX.1: official keys (diffusers' layout) beside our parameters."""

from convert.table import linear, scale

RULES = (
    *linear("x_embedder", "image_in"),
    *linear("context_embedder", "text_in"),
    *linear("time_text_embed.timestep_embedder.linear_1", "time_in.linear_1"),
    *linear("time_text_embed.timestep_embedder.linear_2", "time_in.linear_2"),
    *linear("time_text_embed.guidance_embedder.linear_1", "guidance_in.linear_1"),
    *linear("time_text_embed.guidance_embedder.linear_2", "guidance_in.linear_2"),
    *linear("time_text_embed.text_embedder.linear_1", "pooled_in.linear_1"),
    *linear("time_text_embed.text_embedder.linear_2", "pooled_in.linear_2"),
    # Double-stream blocks, image
    *linear("transformer_blocks.{}.norm1.linear", "double_blocks.image.modulation.linear"),
    *linear("transformer_blocks.{}.attn.to_q", "double_blocks.image.qkv.q"),
    *linear("transformer_blocks.{}.attn.to_k", "double_blocks.image.qkv.k"),
    *linear("transformer_blocks.{}.attn.to_v", "double_blocks.image.qkv.v"),
    *scale("transformer_blocks.{}.attn.norm_q", "double_blocks.image.qkv.norm_q"),
    *scale("transformer_blocks.{}.attn.norm_k", "double_blocks.image.qkv.norm_k"),
    *linear("transformer_blocks.{}.attn.to_out.0", "double_blocks.image.out"),
    *linear("transformer_blocks.{}.ff.net.0.proj", "double_blocks.image.mlp.linear_1"),
    *linear("transformer_blocks.{}.ff.net.2", "double_blocks.image.mlp.linear_2"),
    # Double-stream blocks, text
    *linear("transformer_blocks.{}.norm1_context.linear", "double_blocks.text.modulation.linear"),
    *linear("transformer_blocks.{}.attn.add_q_proj", "double_blocks.text.qkv.q"),
    *linear("transformer_blocks.{}.attn.add_k_proj", "double_blocks.text.qkv.k"),
    *linear("transformer_blocks.{}.attn.add_v_proj", "double_blocks.text.qkv.v"),
    *scale("transformer_blocks.{}.attn.norm_added_q", "double_blocks.text.qkv.norm_q"),
    *scale("transformer_blocks.{}.attn.norm_added_k", "double_blocks.text.qkv.norm_k"),
    *linear("transformer_blocks.{}.attn.to_add_out", "double_blocks.text.out"),
    *linear("transformer_blocks.{}.ff_context.net.0.proj", "double_blocks.text.mlp.linear_1"),
    *linear("transformer_blocks.{}.ff_context.net.2", "double_blocks.text.mlp.linear_2"),
    # Single-stream blocks
    *linear("single_transformer_blocks.{}.norm.linear", "single_blocks.modulation.linear"),
    *linear("single_transformer_blocks.{}.attn.to_q", "single_blocks.qkv.q"),
    *linear("single_transformer_blocks.{}.attn.to_k", "single_blocks.qkv.k"),
    *linear("single_transformer_blocks.{}.attn.to_v", "single_blocks.qkv.v"),
    *scale("single_transformer_blocks.{}.attn.norm_q", "single_blocks.qkv.norm_q"),
    *scale("single_transformer_blocks.{}.attn.norm_k", "single_blocks.qkv.norm_k"),
    *linear("single_transformer_blocks.{}.proj_mlp", "single_blocks.mlp"),
    *linear("single_transformer_blocks.{}.proj_out", "single_blocks.out"),
    *linear("norm_out.linear", "modulation_out.linear"),
    *linear("proj_out", "out"),
)
