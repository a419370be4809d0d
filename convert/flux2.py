"""FLUX.2: official keys (diffusers' layout) beside our parameters."""

from .table import joint_attention, matrix, scale

RULES = (
    *matrix("x_embedder", "image_in"),
    *matrix("context_embedder", "text_in"),
    *matrix("time_guidance_embed.timestep_embedder.linear_1", "time_in.linear_1"),
    *matrix("time_guidance_embed.timestep_embedder.linear_2", "time_in.linear_2"),
    *matrix("time_guidance_embed.guidance_embedder.linear_1", "guidance_in.linear_1"),
    *matrix("time_guidance_embed.guidance_embedder.linear_2", "guidance_in.linear_2"),
    *matrix("double_stream_modulation_img.linear", "image_modulation.linear"),
    *matrix("double_stream_modulation_txt.linear", "text_modulation.linear"),
    *matrix("single_stream_modulation.linear", "single_modulation.linear"),
    # Double-stream blocks
    *joint_attention("transformer_blocks.{}.attn", "double_blocks.{}", matrix),
    *matrix("transformer_blocks.{}.ff.linear_in", "double_blocks.{}.image.mlp.linear_1"),
    *matrix("transformer_blocks.{}.ff.linear_out", "double_blocks.{}.image.mlp.linear_2"),
    *matrix("transformer_blocks.{}.ff_context.linear_in", "double_blocks.{}.text.mlp.linear_1"),
    *matrix("transformer_blocks.{}.ff_context.linear_out", "double_blocks.{}.text.mlp.linear_2"),
    # Single-stream blocks
    *matrix("single_transformer_blocks.{}.attn.to_qkv_mlp_proj", "single_blocks.{}.qkv_mlp"),
    *scale("single_transformer_blocks.{}.attn.norm_q", "single_blocks.{}.norm_q"),
    *scale("single_transformer_blocks.{}.attn.norm_k", "single_blocks.{}.norm_k"),
    *matrix("single_transformer_blocks.{}.attn.to_out", "single_blocks.{}.out"),
    *matrix("norm_out.linear", "modulation_out.linear"),
    *matrix("proj_out", "out"),
)
