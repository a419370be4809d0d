"""A tiny Wan 2.1 text-to-video model."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    SchedulerMixin,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

from tests.tiny.common import randomise, t5_tokenizer


def wan_transformer(*, num_layers: int = 2, seed: int = 0, **overrides) -> WanTransformer3DModel:
    """Wan's transformer at width 48 (3 heads of 16), for 4 latent channels.

    ``overrides`` are further arguments of ``WanTransformer3DModel``.
    """
    arguments = {
        "num_attention_heads": 3,
        # Of 16 channels, 8 are rotated by time, 4 by the row and 4 by the column.
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 24,
        "freq_dim": 32,
        "ffn_dim": 40,
        "rope_max_seq_len": 64,
    }
    transformer = WanTransformer3DModel(num_layers=num_layers, **arguments | overrides)
    randomise(transformer, seed)
    return transformer


def wan_vae(seed: int = 0) -> AutoencoderKLWan:
    """An autoencoder with Wan's structure: 4 latent channels, downsampling by 8 in space and by 4 in time."""
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[-0.76, 0.11, 0.97, -0.29],
        latents_std=[2.82, 1.45, 0.77, 1.92],
    )
    randomise(vae, seed)
    return vae


def wan_scheduler(flow_shift: float = 3.0) -> UniPCMultistepScheduler:
    """The official scheduler; the official shifts are 3 for 480p and 5 for 720p."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=flow_shift,
        solver_order=2,
        solver_type="bh2",
        lower_order_final=True,
        final_sigmas_type="zero",
    )


def store_as(transformer: WanTransformer3DModel, dtype: torch.dtype) -> None:
    """Casts ``transformer`` to a dtype, except the modules that diffusers keeps in float32."""
    kept = set(transformer._keep_in_fp32_modules)
    for name, parameter in transformer.named_parameters():
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def write_wan(
    folder: str | Path,
    *,
    num_layers: int = 2,
    text_length: int = 32,
    dtype: torch.dtype = torch.float32,
    shard_size: str | None = None,
    flow_shift: float = 3.0,
    scheduler: SchedulerMixin | None = None,
    boundary_ratio: float | None = None,
    seed: int = 0,
) -> Path:
    """Writes a tiny Wan to ``folder``, for ``WanPipeline.from_pretrained``; returns it.

    With a ``boundary_ratio`` (officially 0.875) it is a Wan 2.2, which has a second transformer.

    ``text_length`` is the tokenizer's ``model_max_length``; the official pipeline pads to 512. ``scheduler``
    replaces the official one with ``flow_shift``. A ``shard_size`` such as ``"100KB"`` splits larger weight
    files. The VAE stays in float32, as in the official files.
    """
    folder = Path(folder)
    tokenizer = t5_tokenizer(folder / "tokenizer", text_length)
    transformer = wan_transformer(num_layers=num_layers, seed=seed)
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=transformer.config.text_dim,
            d_kv=8,
            d_ff=40,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    randomise(text_encoder, seed + 1)
    second = None
    if boundary_ratio is not None:
        second = wan_transformer(num_layers=num_layers, seed=seed + 3)
    for one in (transformer, second):
        if one is not None:
            store_as(one, dtype)
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.to(dtype),
        vae=wan_vae(seed + 2),
        scheduler=scheduler or wan_scheduler(flow_shift),
        transformer=transformer,
        transformer_2=second,
        boundary_ratio=boundary_ratio,
    )
    pipeline.save_pretrained(folder, max_shard_size=shard_size)
    return folder
