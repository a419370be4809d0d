"""A tiny FLUX.2: [dev] with Mistral's text encoder, or [klein] with Qwen3's."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.tiny.common import mistral_tokenizer, qwen_tokenizer, randomise

HIDDEN = 12  # the transformer reads the states of three layers, 36 channels


def flux2_transformer(
    *,
    guidance_embeds: bool = True,
    num_layers: int = 2,
    num_single_layers: int = 3,
    seed: int = 0,
    **overrides,
) -> Flux2Transformer2DModel:
    """FLUX.2's transformer at width 48 (3 heads of 16), for 4 latent channels patchified to 16.

    ``overrides`` are further arguments of ``Flux2Transformer2DModel``.
    """
    arguments = {
        "in_channels": 16,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 3 * HIDDEN,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (2, 4, 6, 4),
    }
    transformer = Flux2Transformer2DModel(
        guidance_embeds=guidance_embeds,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        **arguments | overrides,
    )
    randomise(transformer, seed)
    return transformer


def flux2_vae(seed: int = 0) -> AutoencoderKLFlux2:
    """An autoencoder with FLUX.2's settings: 4 latent channels, downsampling by 8, statistics of 16
    patchified channels.
    """
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=1024,
        batch_norm_eps=0.1,  # officially 1e-4, which would change no grey level
    )
    randomise(vae, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    vae.bn.running_mean.copy_(0.3 * torch.randn(16, generator=generator))
    vae.bn.running_var.copy_(0.5 + torch.rand(16, generator=generator))
    return vae


def flux2_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The official scheduler. The pipeline decides its shift."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def qwen3(vocabulary: int, hidden: int, layers: int, seed: int) -> Qwen3ForCausalLM:
    """Qwen3 with the width ``hidden``."""
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=20,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=False,
        )
    )
    randomise(model, seed)
    return model


def mistral3(vocabulary: int, seed: int) -> Mistral3ForConditionalGeneration:
    """Mistral Small 3 with 31 layers. FLUX.2 [dev] reads the 10th, 20th and 30th."""
    model = Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config={
                "model_type": "mistral",
                "vocab_size": vocabulary,
                "hidden_size": HIDDEN,
                "intermediate_size": 20,
                "num_hidden_layers": 31,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 8,
            },
            vision_config={
                "model_type": "pixtral",
                "hidden_size": 8,
                "intermediate_size": 12,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            image_token_index=3,
        )
    )
    randomise(model, seed)
    return model


def write_flux2(
    folder: str | Path,
    *,
    klein: bool = True,
    distilled: bool = True,
    dtype: torch.dtype = torch.float32,
    shard_size: str | None = None,
    seed: int = 0,
) -> Path:
    """Writes a tiny FLUX.2 to ``folder``; returns it.

    If ``klein``, it is [klein], for ``Flux2KleinPipeline``, either ``distilled`` or the base model. Otherwise
    it is [dev], for ``Flux2Pipeline``.
    """
    folder = Path(folder)
    parts = {
        "scheduler": flux2_scheduler(),
        "vae": flux2_vae(seed + 2),
        "transformer": flux2_transformer(guidance_embeds=not klein, seed=seed),
    }
    if klein:
        tokenizer = qwen_tokenizer(folder / "tokenizer")
        encoder = qwen3(len(tokenizer), HIDDEN, layers=28, seed=seed + 1)
        pipeline = Flux2KleinPipeline(
            **parts, tokenizer=tokenizer, text_encoder=encoder, is_distilled=distilled
        )
    else:
        # Officially a processor of text and pictures, which needs torchvision. On text the tokenizer does the
        # same.
        tokenizer = mistral_tokenizer()
        encoder = mistral3(len(tokenizer), seed + 1)
        pipeline = Flux2Pipeline(**parts, tokenizer=tokenizer, text_encoder=encoder)
    pipeline.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder
