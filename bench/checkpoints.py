"""Checkpoint folders with random weights in the official layout, of any size.

Weights are drawn and written shard by shard, so a model may be larger than memory. The text encoders have
folders, but no weights.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

STEM = "diffusion_pytorch_model"
FLUX1_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
euler = diffusers.FlowMatchEulerDiscreteScheduler
EULER_DYNAMIC = partial(euler, use_dynamic_shifting=True)


@dataclass(frozen=True)
class Layout:
    """The contents of a family's folder.

    `transformer` and `vae` are diffusers' classes. The options are those of the published model that differ
    from the class's defaults. `encoders` names the text encoders and their tokenizers.
    """

    pipeline: str
    transformer: type
    vae: type
    scheduler: Any
    encoders: tuple[str, ...] = ("text_encoder", "tokenizer")
    transformer_options: Mapping[str, Any] = field(default_factory=dict)
    vae_options: Mapping[str, Any] = field(default_factory=dict)


LAYOUTS = {
    "flux1": Layout(
        "FluxPipeline",
        diffusers.FluxTransformer2DModel,
        diffusers.AutoencoderKL,
        partial(EULER_DYNAMIC, shift=3.0),
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        {"guidance_embeds": True},
        FLUX1_VAE,
    ),
    "flux2": Layout(
        "Flux2KleinPipeline",
        diffusers.Flux2Transformer2DModel,
        diffusers.AutoencoderKLFlux2,
        partial(EULER_DYNAMIC, shift=3.0),
    ),
    "wan": Layout(
        "WanPipeline",
        diffusers.WanTransformer3DModel,
        diffusers.AutoencoderKLWan,
        partial(
            diffusers.UniPCMultistepScheduler,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=3.0,
        ),
    ),
    "z_image": Layout(
        "ZImagePipeline",
        diffusers.ZImageTransformer2DModel,
        diffusers.AutoencoderKL,
        partial(euler, shift=6.0),
        vae_options=FLUX1_VAE,
    ),
    "qwen_image": Layout(
        "QwenImagePipeline",
        diffusers.QwenImageTransformer2DModel,
        diffusers.AutoencoderKLQwenImage,
        partial(EULER_DYNAMIC, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
    ),
}


def write_checkpoint(
    folder: Path, family: str, transformer: dict, vae: dict, dtype: torch.dtype, shard_size: str = "2GB"
) -> Path:
    """Writes a folder of `family`, with `transformer` and `vae` as options, and returns it.

    A folder that was made with the same arguments stays as it is. The VAE is in float32, whatever the
    transformer's `dtype`.
    """
    made_of = json.dumps([family, transformer, vae, str(dtype), shard_size])
    note = folder / "made_of.json"
    if note.is_file() and note.read_text() == made_of:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    layout = LAYOUTS[family]
    partly = folder.with_name(f"{folder.name}.partly")
    shutil.rmtree(partly, ignore_errors=True)
    parts = {
        "transformer": (layout.transformer, {**layout.transformer_options, **transformer}, dtype),
        "vae": (layout.vae, {**layout.vae_options, **vae}, torch.float32),
    }
    for seed, (name, (kind, options, kept)) in enumerate(parts.items()):
        write_random(partly / name, kind, options, kept, shard_size, seed)
    scheduler = layout.scheduler()
    scheduler.save_pretrained(partly / "scheduler")
    for name in layout.encoders:
        (partly / name).mkdir()
        if name.startswith("tokenizer"):
            (partly / name / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512}))
    index = {
        "_class_name": layout.pipeline,
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", type(scheduler).__name__],
        **{name: ["diffusers", kind.__name__] for name, (kind, _, _) in parts.items()},
        **{name: [None, None] for name in layout.encoders},
    }
    if family == "flux2":
        index["is_distilled"] = True
    (partly / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (partly / note.name).write_text(made_of)
    return partly.rename(folder)


def write_random(
    folder: Path, kind: type, options: dict, dtype: torch.dtype, shard_size: str, seed: int
) -> None:
    """Writes `kind(**options)` with random weights: its configuration, shards and their index."""
    with torch.device("meta"):
        model = kind(**options)
    model.save_config(folder)
    # The shards' sizes follow from the dtype that is stored.
    shapes = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    shards = split_torch_state_dict_into_shards(
        shapes, filename_pattern=f"{STEM}{{suffix}}.safetensors", max_shard_size=shard_size
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    for name, keys in shards.filename_to_tensors.items():
        tensors = {key: draw(key, shapes[key], generator).cpu() for key in keys}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def draw(key: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random weights in the shape and dtype of `like`, which keep the size of activations.

    Matrices are scaled by their fan-in. Norms' weights are about 1, and biases about 0.
    """
    values = torch.empty(like.shape, dtype=like.dtype, device=generator.device)
    leaf = key.rpartition(".")[2]
    if not like.is_floating_point():
        return values.zero_()
    if leaf == "running_var":
        return values.uniform_(0.5, 1.5, generator=generator)
    if leaf == "scale_shift_table":
        return values.normal_(0, 0.3, generator=generator)
    # The norms of Wan's VAE have weights called gamma, with several axes but no fan-in.
    if leaf == "gamma" or (like.ndim == 1 and leaf == "weight"):
        return values.normal_(1, 0.1, generator=generator)
    if like.ndim == 1:
        return values.normal_(0, 0.1, generator=generator)
    return values.normal_(0, like[0].numel() ** -0.5, generator=generator)
