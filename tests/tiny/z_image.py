"""A tiny Z-Image, or Z-Image-Turbo."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from tests.tiny.common import qwen_tokenizer, randomise
from tests.tiny.flux1 import flux1_vae
from tests.tiny.flux2 import qwen3

HIDDEN = 20


def z_image_transformer(*, n_layers: int = 3, seed: int = 0, **overrides) -> ZImageTransformer2DModel:
    """Z-Image's transformer at width 48 (3 heads of 16), for 4 latent channels.

    ``overrides`` are further arguments of ``ZImageTransformer2DModel``.
    """
    arguments = {
        "in_channels": 4,
        "dim": 48,
        "n_refiner_layers": 2,
        "n_heads": 3,
        "n_kv_heads": 3,
        "cap_feat_dim": HIDDEN,
        "axes_dims": [4, 8, 4],
    }
    transformer = ZImageTransformer2DModel(n_layers=n_layers, **arguments | overrides)
    randomise(transformer, seed)
    return transformer


def z_image_scheduler(*, turbo: bool = False) -> FlowMatchEulerDiscreteScheduler:
    """The official scheduler."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0 if turbo else 6.0, use_dynamic_shifting=False)


def write_z_image(
    folder: str | Path,
    *,
    turbo: bool = False,
    n_layers: int = 3,
    dtype: torch.dtype = torch.float32,
    shard_size: str | None = None,
    seed: int = 0,
) -> Path:
    """Writes a tiny Z-Image to ``folder``, for ``ZImagePipeline.from_pretrained``; returns it."""
    folder = Path(folder)
    tokenizer = qwen_tokenizer(folder / "tokenizer")
    text_encoder = qwen3(len(tokenizer), HIDDEN, layers=3, seed=seed + 1)
    pipeline = ZImagePipeline(
        scheduler=z_image_scheduler(turbo=turbo),
        vae=flux1_vae(seed=seed + 2),
        text_encoder=text_encoder.model,
        tokenizer=tokenizer,
        transformer=z_image_transformer(n_layers=n_layers, seed=seed),
    )
    pipeline.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    # Official folders hold a whole language model. The pipeline loads all of it but the head.
    text_encoder.to(dtype).save_pretrained(folder / "text_encoder")
    return folder
