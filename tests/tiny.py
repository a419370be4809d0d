"""Small random checkpoints in the official layout, for tests: real structure, no knowledge.

Widths are chosen to differ wherever the official ones do, so that two axes cannot be mistaken
for each other, and no parameter keeps the zeros or ones that diffusers initialises it with.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CLIP_LENGTH = 77


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int) -> None:
    """Draws every parameter anew: matrices by fan-in, norm weights around 1, biases around 0.

    A bias of zero, or a norm weight of one, would let a converter that drops it pass.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            values /= parameter[0].numel() ** 0.5
        else:
            values = 0.3 * values + (0.0 if name.endswith("bias") else 1.0)
        parameter.copy_(values)


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte-level tokenizer with one token a byte, written to ``folder`` as vocabulary files."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    # One merge, so that merging happens at all; the end token has the largest id, as officially.
    tokens += ["th", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=CLIP_LENGTH)


def t5_tokenizer(folder: Path, text_length: int) -> T5TokenizerFast:
    """Unigram tokenizer with one token an ASCII character, written to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(c, -3.0) for c in string.ascii_letters + string.digits + string.punctuation]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return T5TokenizerFast.from_pretrained(folder, extra_ids=0, model_max_length=text_length)


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
    """Autoencoder with FLUX.1's settings: 4 latent channels, 8 times down."""
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
    """The official scheduler of FLUX.1-dev, or of FLUX.1-schnell."""
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

    ``guidance_embeds`` is, unless given, what the model has: true for dev, false for schnell.
    ``text_length`` is the T5 tokenizer's ``model_max_length`` (officially 512); a
    ``shard_size`` such as ``"100KB"`` splits larger weight files.
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
            # The official values, wrong as they are: 2 means "pool at the largest token id".
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
