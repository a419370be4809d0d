"""Checkpoints of official size, without their weights: every key, every shape, every default."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from flax import nnx

from jaxspd.convert import flux1, flux2, qwen_image, wan, z_image
from jaxspd.convert.loader import assign, flat_parameters
from jaxspd.families import PIPELINES, family_class
from jaxspd.models.flux1 import Flux1Config, Flux1Transformer
from jaxspd.models.flux2 import Flux2Config, Flux2Transformer
from jaxspd.models.qwen_image import QwenImageConfig, QwenImageTransformer
from jaxspd.models.wan import WanConfig, WanTransformer
from jaxspd.models.z_image import ZImageConfig, ZImageTransformer


@dataclass(frozen=True)
class Architecture:
    """A transformer as diffusers and as we have it; `unread` are options of diffusers' class that no
    checkpoint of the family uses.
    """

    official: type
    ours: type
    config: Any
    rules: tuple
    unread: tuple[str, ...] = ()


ARCHITECTURES = {
    "flux1": Architecture(FluxTransformer2DModel, Flux1Transformer, Flux1Config, flux1.RULES),
    "flux2": Architecture(Flux2Transformer2DModel, Flux2Transformer, Flux2Config, flux2.RULES),
    "qwen_image": Architecture(
        QwenImageTransformer2DModel,
        QwenImageTransformer,
        QwenImageConfig,
        qwen_image.RULES,
        ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"),
    ),
    "wan": Architecture(
        WanTransformer3DModel,
        WanTransformer,
        WanConfig,
        wan.RULES,
        # The first two change nothing in diffusers' class, the others belong to image-to-video.
        ("qk_norm", "rope_max_seq_len", "image_dim", "added_kv_proj_dim", "pos_embed_seq_len"),
    ),
    "z_image": Architecture(
        ZImageTransformer2DModel,
        ZImageTransformer,
        ZImageConfig,
        z_image.RULES,
        # The first two are fixed for text-to-image, the third is another model's; diffusers' class has as
        # many key heads as heads whatever the fourth says, and the last only limits positions.
        ("all_patch_size", "all_f_patch_size", "siglip_feat_dim", "n_kv_heads", "axes_lens"),
    ),
}
KLEIN = {"num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False}
# Options beyond the class's defaults, official keys, parameters.
CHECKPOINTS = {
    "FLUX.1-dev": ("flux1", {"guidance_embeds": True}, 1160, 11_901_408_320),
    "FLUX.1-schnell": ("flux1", {"guidance_embeds": False}, 1156, 11_891_178_560),
    "FLUX.2-dev": ("flux2", {}, 331, 32_223_281_152),
    "FLUX.2-klein-4B": ("flux2", KLEIN | {"num_layers": 5, "num_single_layers": 20}, 169, 3_875_544_576),
    "FLUX.2-klein-9B": (
        "flux2",
        KLEIN
        | {
            "num_layers": 8,
            "num_single_layers": 24,
            "num_attention_heads": 32,
            "joint_attention_dim": 12288,
        },
        233,
        9_078_581_248,
    ),
    "Qwen-Image": ("qwen_image", {}, 1933, 20_430_401_088),
    "Wan2.1-T2V-1.3B": (
        "wan",
        {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
        825,
        1_418_996_800,
    ),
    "Wan2.1-T2V-14B": ("wan", {}, 1095, 14_288_491_584),
    "Z-Image": ("z_image", {}, 521, 6_154_908_736),
}
architectures = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_full_size_checkpoints_fit_key_by_key(checkpoint):
    name, options, keys, total = CHECKPOINTS[checkpoint]
    architecture = ARCHITECTURES[name]
    with torch.device("meta"):
        model = architecture.official(**options)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert len(shapes) == keys

    config = architecture.config(**options)
    abstract = flat_parameters(nnx.state(architecture.ours(config, dtype=jnp.bfloat16)))
    assert sum(int(np.prod(p.shape)) for p in jax.tree.leaves(abstract)) == total
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == total

    table = assign(set(shapes), shapes.__getitem__, abstract, architecture.rules)
    assert set(table) == set(abstract)
    assert Counter(table.values()) == Counter(shapes.keys())


@architectures
def test_config_defaults_are_the_official_classs(name):
    architecture = ARCHITECTURES[name]
    with torch.device("meta"):
        theirs = dict(architecture.official().config)
    ours = vars(architecture.config())
    told = {key: tuple(v) if isinstance(v, list) else v for key, v in theirs.items()}
    assert {key: told[key] for key in ours} == ours
    assert {key for key in theirs if not key.startswith("_")} == set(ours) | set(architecture.unread)


@architectures
def test_no_rule_is_written_twice(name):
    rules = ARCHITECTURES[name].rules
    for names in ([rule.official for rule in rules], [rule.path for rule in rules]):
        assert max(Counter(names).values()) == 1


def test_every_family_is_here():
    assert set(ARCHITECTURES) == set(PIPELINES.values())
    for name, architecture in ARCHITECTURES.items():
        family = family_class(name)
        assert (family.transformer, family.rules) == (architecture.ours, architecture.rules)
        assert isinstance(family().config, architecture.config)
