"""A tiny Qwen-Image."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.tiny.common import qwen_tokenizer, randomise


def qwen_image_transformer(*, num_layers: int = 2, seed: int = 0, **overrides) -> QwenImageTransformer2DModel:
    """Qwen-Image's transformer at width 48 (3 heads of 16), for 4 latent channels packed to 16.

    ``overrides`` are further arguments of ``QwenImageTransformer2DModel``.
    """
    arguments = {
        "in_channels": 16,
        "out_channels": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    }
    transformer = QwenImageTransformer2DModel(num_layers=num_layers, **arguments | overrides)
    randomise(transformer, seed)
    return transformer


def qwen_image_vae(seed: int = 0) -> AutoencoderKLQwenImage:
    """An autoencoder with Qwen-Image's structure: 4 latent channels, downsampling by 8."""
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[-0.76, 0.11, 0.97, -0.29],
        latents_std=[2.82, 1.45, 0.77, 1.92],
    )
    randomise(vae, seed)
    return vae


def qwen_image_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The official scheduler."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


def write_qwen_image(
    folder: str | Path,
    *,
    num_layers: int = 2,
    dtype: torch.dtype = torch.float32,
    shard_size: str | None = None,
    seed: int = 0,
) -> Path:
    """Writes a tiny Qwen-Image to ``folder``, for ``QwenImagePipeline.from_pretrained``; returns it."""
    folder = Path(folder)
    tokenizer = qwen_tokenizer(folder / "tokenizer")
    transformer = qwen_image_transformer(num_layers=num_layers, seed=seed)
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": transformer.config.joint_attention_dim,
                "intermediate_size": 40,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": transformer.config.joint_attention_dim,
                "fullatt_block_indexes": [0],
            },
        )
    )
    randomise(text_encoder, seed + 1)
    pipeline = QwenImagePipeline(
        scheduler=qwen_image_scheduler(),
        vae=qwen_image_vae(seed + 2),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipeline.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder
