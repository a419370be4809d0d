"""Real files, of which only hashes of their tensors' names and shapes are kept here: we name, or the library
classes that we run name, every tensor as they do.
"""

import hashlib
from functools import cache

import jax.numpy as jnp
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderKLWan
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from jaxspd.convert.loader import flat_parameters
from jaxspd.convert.table import official_keys
from tests import tiny
from tests.compare import relative
from tests.components import components
from tests.test_full_size import ARCHITECTURES, CHECKPOINTS

# The MD5 of `key:dim0_dim1_…` and `key` of every tensor, sorted and joined by commas: public model managers
# tell files apart so. Of FLUX.1's and Wan's transformers they know the original layout only.
TRANSFORMERS = {
    "FLUX.2-dev": "d38e1d5c5aec3b0a11e79327ac6e3b0f",
    "FLUX.2-klein-4B": "3bde7b817fec8143028b6825a63180df",
    "FLUX.2-klein-9B": "39c6fc48f07bebecedbbaa971ff466c8",
    "Qwen-Image": "0319a1cb19835fb510907dd3367c95ff",
    "Z-Image": "fc3a8a1247fe185ce116ccbe0e426c28",
}
# The MD5 of the names in a real index file, sorted and joined by commas, its bytes, and those of a parameter.
# Wan's is of an expert of Wan 2.2, which is built as 2.1's 14B and stored in float32.
INDEXES = {
    "FLUX.1-dev": ("318131327eaab4435cc95da66049e039", 23_802_816_640, 2),
    "FLUX.1-schnell": ("619038d28014cdc9223099e1492f535d", 23_782_357_120, 2),
    "FLUX.2-klein-9B": ("4d110dee4cc6cc36994f86c251eda2a4", 18_157_162_496, 2),
    "Qwen-Image": ("f3cee9a07e2a70696f7e903abbd2bfde", 40_860_802_176, 2),
    "Wan2.1-T2V-14B": ("69e090b361f377caa6276e2f858d50fe", 57_153_966_336, 4),
    "Z-Image": ("a7cc46f8e7c58f3738c44eb53b557fd5", 12_309_817_472, 2),
}

QWEN3 = {"num_hidden_layers": 36, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936}
QWEN3_4B = Qwen3Config(hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True, **QWEN3)
QWEN3_8B = Qwen3Config(hidden_size=4096, intermediate_size=12_288, tie_word_embeddings=False, **QWEN3)
QWEN_VL = Qwen2_5_VLConfig(
    text_config={
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
    },
    vision_config={"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
)
MISTRAL3 = Mistral3Config(
    text_config={
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 32_768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131_072,
    },
    vision_config={
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "head_dim": 64,
        "patch_size": 14,
        "num_hidden_layers": 24,
    },
    spatial_merge_size=2,
    multimodal_projector_bias=False,
)
T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10_240,
    "num_heads": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
}
# What transformers has named anew since the files were written, which it reads by either name.
CLIP_NAMES = (("embeddings.", "text_model.embeddings."), ("encoder.", "text_model.encoder."))
CLIP_NAMES += (("final_layer_norm.", "text_model.final_layer_norm."),)
QWEN_VL_NAMES = (("model.language_model.", "model."), ("model.visual.", "visual."))
MISTRAL3_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
# One matrix by two names is stored once.
SHARED, TIED = "encoder.embed_tokens.weight", "lm_head.weight"
TEXT_ENCODERS = {
    "FLUX.1's CLIP": (
        lambda: CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
        ),
        CLIP_NAMES,
        None,
        "94eefa3dac9cec93cb1ebaf1747d7b78",
    ),
    "FLUX.1's T5": (
        lambda: T5EncoderModel(T5Config(**T5_XXL)),
        (),
        SHARED,
        "22540b49eaedbc2f2784b2091a234c7c",
    ),
    "Z-Image's and klein 4B's Qwen3": (
        lambda: Qwen3ForCausalLM(QWEN3_4B),
        (),
        TIED,
        "0f050f62a88876fea6eae0a18dac5a2e",
    ),
    "klein 9B's Qwen3": (lambda: Qwen3ForCausalLM(QWEN3_8B), (), None, "9195f3ea256fcd0ae6d929c203470754"),
    "FLUX.2-dev's Mistral3": (
        lambda: Mistral3ForConditionalGeneration(MISTRAL3),
        MISTRAL3_NAMES,
        None,
        "28fca3d8e5bf2a2d1271748a773f6757",
    ),
    "Qwen-Image's Qwen2.5-VL": (
        lambda: Qwen2_5_VLForConditionalGeneration(QWEN_VL),
        QWEN_VL_NAMES,
        None,
        "8004730443f55db63092006dd9f7110e",
    ),
}
VAE_OF_FLUX1 = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
VAES = {
    "FLUX.1's and Z-Image's": (AutoencoderKL, VAE_OF_FLUX1, "1aafa3cc91716fb6b300cc1cd51b85a3"),
    "FLUX.2's": (AutoencoderKLFlux2, {}, "c54288e3ee12ca215898840682337b95"),
    "Qwen-Image's": (AutoencoderKLQwenImage, {}, "ed4ea5824d55ec3107b09815e318123a"),
    "Wan's": (AutoencoderKLWan, {}, "ed4ea5824d55ec3107b09815e318123a"),
}


def md5(names) -> str:
    return hashlib.md5(",".join(sorted(names)).encode()).hexdigest()


def with_shapes(shapes) -> str:
    """The MD5 of a file of `shapes[key]`."""
    return md5([*shapes, *(f"{key}:{'_'.join(map(str, shape))}" for key, shape in shapes.items())])


def of_module(make) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in make().state_dict().items()}


@cache
def of_rules(checkpoint: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes that our parameters have by our table."""
    name, options, *_ = CHECKPOINTS[checkpoint]
    architecture = ARCHITECTURES[name]
    config = architecture.config(**options)
    parameters = flat_parameters(nnx.state(architecture.ours(config, dtype=jnp.bfloat16)))
    return {
        key: parameters[path].shape for path, key in official_keys(parameters, architecture.rules).items()
    }


def renamed(key: str, names) -> str:
    return next((old + key.removeprefix(new) for new, old in names if key.startswith(new)), key)


@pytest.mark.parametrize("checkpoint", TRANSFORMERS)
def test_our_table_gives_the_real_files_names_and_shapes(checkpoint):
    assert with_shapes(of_rules(checkpoint)) == TRANSFORMERS[checkpoint]


@pytest.mark.parametrize("checkpoint", INDEXES)
def test_our_table_gives_the_real_index_files_names_and_size(checkpoint):
    names, size, width = INDEXES[checkpoint]
    *_, parameters = CHECKPOINTS[checkpoint]
    assert md5(of_rules(checkpoint)) == names
    assert size == width * parameters


@pytest.mark.parametrize("encoder", TEXT_ENCODERS)
def test_text_encoders_are_the_real_files(encoder):
    make, names, twice, expected = TEXT_ENCODERS[encoder]
    shapes = {renamed(key, names): shape for key, shape in of_module(make).items() if key != twice}
    assert with_shapes(shapes) == expected


def test_umt5_is_the_real_index_file():
    shapes = of_module(lambda: UMT5EncoderModel(UMT5Config(vocab_size=256_384, **T5_XXL)))
    del shapes[SHARED]
    assert md5(shapes) == "049b6e27c2808bd6245cef436edeb63c"
    assert 2 * sum(torch.Size(shape).numel() for shape in shapes.values()) == 11_361_820_672


@pytest.mark.parametrize("vae", VAES)
def test_vaes_are_the_real_files(vae):
    kind, options, expected = VAES[vae]
    assert with_shapes(of_module(lambda: kind(**options))) == expected


def test_clip_is_read_by_the_names_in_the_real_file(tmp_path, flux1_folder):
    """The small checkpoints' other encoders are written by those names; CLIP's only here."""
    folder = tiny.write_flux1(tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    official = {renamed(key, CLIP_NAMES): tensor for key, tensor in tensors.items()}
    assert not official.keys() & tensors.keys()
    save_file(official, file, {"format": "pt"})
    ours, expected = (components(f).encode_text(["a lake"])["pooled"] for f in (folder, flux1_folder))
    assert relative(ours, expected) == 0
