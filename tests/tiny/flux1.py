"""A tiny FLUX.1."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from tests.tiny.common import CLIP_LENGTH, clip_tokenizer, randomise, t5_tokenizer


def flux1_transformer(
    *, guidance_embeds: bool = True, num_layers: int = 2, num_single_layers: int = 3, seed: int = 0
) -> FluxTransformer2DModel:
    """FLUX.1's transformer at width 48 (3 heads of 16), for 4 latent channels packed to 16."""
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    randomise(transformer, seed)
    return transformer


def flux1_vae(*, seed: int = 0) -> AutoencoderKL:
    """An autoencoder with FLUX.1's settings: 4 latent channels, downsampling by 8."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    randomise(vae, seed)
    return vae


def flux1_scheduler(*, schnell: bool = False) -> FlowMatchEulerDiscreteScheduler:
    """The official scheduler of FLUX.1-dev or of FLUX.1-schnell."""
    return FlowMatchEulerDiscreteScheduler(
        shift=1.0 if schnell else 3.0,
        use_dynamic_shifting=not schnell,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def write_flux1(
    folder: str | Path,
    *,
    schnell: bool = False,
    guidance_embeds: bool | None = None,
    num_layers: int = 2,
    num_single_layers: int = 3,
    text_length: int = 32,
    dtype: torch.dtype = torch.float32,
    shard_size: str | None = None,
    seed: int = 0,
) -> Path:
    """Writes a tiny FLUX.1 to ``folder``, for ``FluxPipeline.from_pretrained``; returns it.

    ``guidance_embeds`` is by default that of the model: true for dev, false for schnell. ``text_length`` is
    the T5 tokenizer's ``model_max_length`` (officially 512). A ``shard_size`` such as ``"100KB"`` splits
    larger weight files.
    """
    folder = Path(folder)
    tokenizer = clip_tokenizer(folder / "tokenizer")
    tokenizer_2 = t5_tokenizer(folder / "tokenizer_2", text_length)
    transformer = flux1_transformer(
        guidance_embeds=not schnell if guidance_embeds is None else guidance_embeds,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        seed=seed,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=transformer.config.pooled_projection_dim,
            intermediate_size=40,
            projection_dim=transformer.config.pooled_projection_dim,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_LENGTH,
            # The official values. They are wrong: 2 means "pool at the largest token id".
            bos_token_id=0,
            eos_token_id=2,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_2),
            d_model=transformer.config.joint_attention_dim,
            d_kv=8,
            d_ff=40,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )
    randomise(text_encoder, seed + 1)
    randomise(text_encoder_2, seed + 2)
    pipeline = FluxPipeline(
        scheduler=flux1_scheduler(schnell=schnell),
        vae=flux1_vae(seed=seed + 3),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )
    pipeline.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder
