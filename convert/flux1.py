"""FLUX.1: official keys (diffusers' layout) beside our parameters."""

from .table import joint_attention, linear, scale

RULES = (
    *linear("x_embedder", "image_in"),
    *linear("context_embedder", "text_in"),
    *linear("time_text_embed.timestep_embedder.linear_1", "time_in.linear_1"),
    *linear("time_text_embed.timestep_embedder.linear_2", "time_in.linear_2"),
    *linear("time_text_embed.guidance_embedder.linear_1", "guidance_in.linear_1"),
    *linear("time_text_embed.guidance_embedder.linear_2", "guidance_in.linear_2"),
    *linear("time_text_embed.text_embedder.linear_1", "pooled_in.linear_1"),
    *linear("time_text_embed.text_embedder.linear_2", "pooled_in.linear_2"),
    # Double-stream blocks
    *joint_attention("transformer_blocks.{}.attn", "double_blocks.{}"),
    *linear("transformer_blocks.{}.norm1.linear", "double_blocks.{}.image_modulation.linear"),
    *linear("transformer_blocks.{}.ff.net.0.proj", "double_blocks.{}.image.mlp.linear_1"),
    *linear("transformer_blocks.{}.ff.net.2", "double_blocks.{}.image.mlp.linear_2"),
    *linear("transformer_blocks.{}.norm1_context.linear", "double_blocks.{}.text_modulation.linear"),
    *linear("transformer_blocks.{}.ff_context.net.0.proj", "double_blocks.{}.text.mlp.linear_1"),
    *linear("transformer_blocks.{}.ff_context.net.2", "double_blocks.{}.text.mlp.linear_2"),
    # Single-stream blocks
    *linear("single_transformer_blocks.{}.norm.linear", "single_blocks.{}.modulation.linear"),
    *linear("single_transformer_blocks.{}.attn.to_q", "single_blocks.{}.qkv.q"),
    *linear("single_transformer_blocks.{}.attn.to_k", "single_blocks.{}.qkv.k"),
    *linear("single_transformer_blocks.{}.attn.to_v", "single_blocks.{}.qkv.v"),
    *scale("single_transformer_blocks.{}.attn.norm_q", "single_blocks.{}.qkv.norm_q"),
    *scale("single_transformer_blocks.{}.attn.norm_k", "single_blocks.{}.qkv.norm_k"),
    *linear("single_transformer_blocks.{}.proj_mlp", "single_blocks.{}.mlp"),
    *linear("single_transformer_blocks.{}.proj_out", "single_blocks.{}.out"),
    *linear("norm_out.linear", "modulation_out.linear"),
    *linear("proj_out", "out"),
)
