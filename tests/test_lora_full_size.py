"""LoRAs of whole published models, by names and shapes alone: every layer is found, once."""

from dataclasses import asdict, replace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxspd.convert import lora_file
from jaxspd.convert.loader import flat_parameters
from jaxspd.convert.lora import changes, transformer
from jaxspd.convert.lora_file import LoraFile
from jaxspd.convert.table import official_keys
from jaxspd.families import family_class
from jaxspd.models.flux2 import Flux2Config

RANK = 16


class Shapes:
    """Tensors of which there are only names and shapes."""

    metadata, folder, config = {}, "a file", "its config.json"

    def __init__(self, shapes):
        self._shapes = shapes

    def keys(self):
        return set(self._shapes)

    def shape(self, key):
        return self._shapes[key]

    def check_floats(self):
        pass

    def read(self, key):
        return np.full(self._shapes[key], RANK, np.float32)


def flux1_kohya():
    """As kohya's trainer writes FLUX.1's: 304 layers, of which fused ones are 494 in diffusers."""
    dim, layers = 3072, {}
    for block in range(19):
        for stream in ("img", "txt"):
            for layer, rows, columns in (
                ("attn_qkv", 3, 1),
                ("attn_proj", 1, 1),
                ("mlp_0", 4, 1),
                ("mlp_2", 1, 4),
                ("mod_lin", 6, 1),
            ):
                layers[f"lora_unet_double_blocks_{block}_{stream}_{layer}"] = rows * dim, columns * dim
    for block in range(38):
        for layer, rows, columns in (("linear1", 7, 1), ("linear2", 1, 5), ("modulation_lin", 3, 1)):
            layers[f"lora_unet_single_blocks_{block}_{layer}"] = rows * dim, columns * dim
    return layers, 304, 494


def qwen_lightning():
    """As Qwen-Image-Lightning's: the attention and both MLPs of all blocks."""
    dim, layers = 3072, {}
    attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    for block in range(60):
        name = f"transformer_blocks.{block}"
        layers |= {f"{name}.attn.{layer}": (dim, dim) for layer in attention}
        for stream in ("img", "txt"):
            layers[f"{name}.{stream}_mlp.net.0.proj"] = 4 * dim, dim
            layers[f"{name}.{stream}_mlp.net.2"] = dim, 4 * dim
    return layers, 720, 720


def wan_14b():
    """As those for ComfyUI on the authors' names."""
    dim, hidden, layers = 5120, 13824, {}
    for block in range(40):
        name = f"diffusion_model.blocks.{block}"
        for part in ("self_attn", "cross_attn"):
            layers |= {f"{name}.{part}.{layer}": (dim, dim) for layer in "qkvo"}
        layers |= {f"{name}.ffn.0": (hidden, dim), f"{name}.ffn.2": (dim, hidden)}
    return layers, 400, 400


def z_image_comfyui():
    """With queries, keys and values in one, as ComfyUI has them."""
    dim, layers = 3840, {}
    for stack, count in (("layers", 30), ("noise_refiner", 2), ("context_refiner", 2)):
        for block in range(count):
            name = f"diffusion_model.{stack}.{block}.attention"
            layers |= {f"{name}.qkv": (3 * dim, dim), f"{name}.out": (dim, dim)}
    return layers, 68, 136


def flux2_aitoolkit():
    """Of FLUX.2 [dev], on the authors' names."""
    dim, layers = 6144, {}
    for block in range(8):
        for stream in ("img", "txt"):
            name = f"diffusion_model.double_blocks.{block}.{stream}_attn"
            layers |= {f"{name}.qkv": (3 * dim, dim), f"{name}.proj": (dim, dim)}
    for block in range(48):
        layers[f"diffusion_model.single_blocks.{block}.linear1"] = 9 * dim, dim
        layers[f"diffusion_model.single_blocks.{block}.linear2"] = dim, 4 * dim
    return layers, 128, 160


@pytest.mark.parametrize(
    ("name", "case", "config"),
    [
        ("flux1", flux1_kohya, {}),
        ("flux2", flux2_aitoolkit, asdict(Flux2Config())),
        ("qwen_image", qwen_lightning, {}),
        ("wan", wan_14b, {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}),
        ("z_image", z_image_comfyui, {}),
    ],
)
def test_every_layer_is_found_once(monkeypatch, tmp_path, name, case, config):
    layers, modules, tensors = case()
    shapes = {}
    for layer, (rows, columns) in layers.items():
        shapes |= {f"{layer}.lora_down.weight": (RANK, columns), f"{layer}.lora_up.weight": (rows, RANK)}
        shapes[f"{layer}.alpha"] = ()
    monkeypatch.setattr(lora_file, "open_file", lambda path: Shapes(shapes))
    family = family_class(name)()
    family = replace(family, config=replace(family.config, **config))
    parameters = flat_parameters(family.abstract_parameters(jnp.bfloat16))
    model = {key: parameters[path].shape for path, key in official_keys(parameters, family.rules).items()}
    file = LoraFile(tmp_path)
    assert len(file.modules) == modules
    found = changes([(file, 1.0)], transformer(name, Shapes(model), family.rules))
    assert len(found) == tensors
    assert all(len(own) == 1 for own in found.values())
