"""Qwen-Image: official keys (diffusers' layout) beside our parameters."""

from .table import joint_attention, linear, scale

RULES = (
    *linear("img_in", "image_in"),
    *scale("txt_norm", "text_norm"),
    *linear("txt_in", "text_in"),
    *linear("time_text_embed.timestep_embedder.linear_1", "time_in.linear_1"),
    *linear("time_text_embed.timestep_embedder.linear_2", "time_in.linear_2"),
    *joint_attention("transformer_blocks.{}.attn", "blocks.{}"),
    *linear("transformer_blocks.{}.img_mod.1", "blocks.{}.image_modulation.linear"),
    *linear("transformer_blocks.{}.img_mlp.net.0.proj", "blocks.{}.image.mlp.linear_1"),
    *linear("transformer_blocks.{}.img_mlp.net.2", "blocks.{}.image.mlp.linear_2"),
    *linear("transformer_blocks.{}.txt_mod.1", "blocks.{}.text_modulation.linear"),
    *linear("transformer_blocks.{}.txt_mlp.net.0.proj", "blocks.{}.text.mlp.linear_1"),
    *linear("transformer_blocks.{}.txt_mlp.net.2", "blocks.{}.text.mlp.linear_2"),
    *linear("norm_out.linear", "modulation_out.linear"),
    *linear("proj_out", "out"),
)
