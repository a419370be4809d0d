"""Which layers a LoRA changes, by its names: the dialects of all trainers, proven by lists of real files."""

import pytest

from jaxspd.convert.lora_names import parse
from tests.headers import lora, single_file
from tests.test_official_keys import of_rules, with_shapes

KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")


@pytest.fixture(scope="module")
def dev():
    """FLUX.1 [dev] in its authors' layout."""
    return single_file("FLUX.1-dev", "bfl")


def flat(prefix):
    return lambda layer: prefix + layer.replace(".", "_")


def in_blocks(name_of):
    return lambda layer: name_of(layer) if "blocks." in layer else None


def control(dev):
    """FLUX.1 Depth's LoRA, which reads twice the channels."""
    shapes = lora(dev, lambda layer: layer, *PEFT, rank=128)
    shapes |= {
        f"{key[:-7]}.lora_B.bias": dev[key][:1] for key in dev if f"{key[:-7]}.lora_B.weight" in shapes
    }
    shapes |= {key: shape for key, shape in dev.items() if key.endswith("_norm.scale")}
    return shapes | {"img_in.lora_A.weight": (128, 128)}


def xlabs():
    return {
        f"double_blocks.{block}.processor.{layer}_lora{stream}.{factor}.weight": shape
        for block in (0, 1, 10)
        for layer, rows in (("proj", 3072), ("qkv", 9216))
        for stream in (1, 2)
        for factor, shape in (("down", (16, 3072)), ("up", (rows, 16)))
    }


def lightning():
    names = [f"transformer_blocks.{block}.attn.to_{name}" for block in (0, 1) for name in "kq"][:3]
    weights = {f"{name}.weight": (3072, 3072) for name in names}
    return lora(weights, lambda layer: layer, *KOHYA, rank=64, alpha=True)


# Of real files: how a list of their names and shapes is made, its MD5 (see test_official_keys.py), and what
# is to be found in it: family, layout, dialect, layers, tensors of none.
REAL = {
    "kohya": (
        lambda dev: lora(dev, in_blocks(flat("lora_unet_")), *KOHYA, rank=16, alpha=True),
        "e026f020a06f34c3006ff148de7c1743",
        ("flux1", "bfl", "kohya", 304, 0),
    ),
    "diffusers": (
        lambda dev: lora(of_rules("FLUX.1-dev"), in_blocks("transformer.{}".format), *PEFT, rank=32),
        "865f13e3463edd0182b1cfb499a4e4a9",
        ("flux1", "diffusers", "diffusers", 494, 0),
    ),
    "control": (
        control,
        "9e727332e4e87985b2c63d34dbd43414",
        ("flux1", "bfl", "control", 314, 152),
    ),
    "xlabs": (
        lambda dev: xlabs(),
        "8db90959469afa473696de392023df5c",
        ("flux1", "xlabs", "xlabs", 12, 0),
    ),
    "lightning": (
        lambda dev: lightning(),
        "b16e04c2a5d5ccbc94dccb67dc639dda",
        ("qwen_image", "diffusers", "diffusers", 3, 0),
    ),
}


def found(shapes):
    names = parse(shapes)
    return names.family, names.layout, names.dialect, len(names.modules), len(names.unmatched)


@pytest.mark.parametrize("name", REAL)
def test_every_layer_of_a_real_file_is_found(dev, name):
    make, md5, expected = REAL[name]
    shapes = make(dev)
    assert with_shapes(shapes) == md5
    assert found(shapes) == expected


def test_text_encoders_are_apart(dev):
    shapes = lora(dev, in_blocks(flat("lora_unet_")), *KOHYA, rank=16, alpha=True)
    text = {
        f"lora_te1_text_model_encoder_layers_{n}_mlp_fc1{end}": (4, 4) for n in range(12) for end in KOHYA
    }
    names = parse(shapes | text)
    assert len(names.text) == 24
    assert (len(names.modules), names.unmatched) == (304, ())


# Checkpoint, layout, how a layer is written, the two suffixes, and the dialect.
DIALECTS = {
    "ai-toolkit": ("FLUX.1-dev", "bfl", "diffusion_model.{}".format, PEFT, "aitoolkit"),
    "peft of BFL's": ("FLUX.1-dev", "bfl", "base_model.model.{}".format, PEFT, "peft"),
    "peft of diffusers'": ("FLUX.1-dev", "diffusers", "base_model.model.transformer.{}".format, PEFT, "peft"),
    "OneTrainer": ("FLUX.1-dev", "diffusers", flat("lora_transformer_"), KOHYA, "onetrainer"),
    "LyCORIS": ("FLUX.1-dev", "diffusers", flat("lycoris_"), KOHYA, "lycoris"),
    "old diffusers": (
        "FLUX.1-dev",
        "diffusers",
        "transformer.{}".format,
        (".lora.down.weight", ".lora.up.weight"),
        "diffusers",
    ),
    "oldest diffusers": (
        "FLUX.1-dev",
        "diffusers",
        "transformer.{}".format,
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        "diffusers",
    ),
    "FLUX.2, kohya": ("FLUX.2-klein-4B", "bfl", flat("lora_unet_"), KOHYA, "kohya"),
    "FLUX.2, ai-toolkit": ("FLUX.2-klein-9B", "bfl", "diffusion_model.{}".format, PEFT, "aitoolkit"),
    "FLUX.2, diffusers": ("FLUX.2-dev", "diffusers", "transformer.{}".format, PEFT, "diffusers"),
    "Wan, musubi": ("Wan2.1-T2V-14B", "wan", flat("lora_unet_"), KOHYA, "kohya"),
    "Wan, lightx2v": ("Wan2.1-T2V-14B", "wan", "diffusion_model.{}".format, KOHYA, "comfyui"),
    "Wan, diffusers": ("Wan2.1-T2V-1.3B", "diffusers", "transformer.{}".format, PEFT, "diffusers"),
    "Qwen-Image, musubi": ("Qwen-Image", "diffusers", flat("lora_unet_"), KOHYA, "kohya"),
    "Qwen-Image, DiffSynth": (
        "Qwen-Image",
        "diffusers",
        "{}".format,
        (".lora_A.default.weight", ".lora_B.default.weight"),
        "peft",
    ),
    "Z-Image, ai-toolkit": ("Z-Image", "diffusers", "diffusion_model.{}".format, PEFT, "aitoolkit"),
    "Z-Image, ComfyUI": ("Z-Image", "comfyui", flat("lora_unet_"), KOHYA, "kohya"),
}


@pytest.mark.parametrize("name", DIALECTS)
def test_every_layer_of_every_dialect(name):
    checkpoint, layout, name_of, suffixes, dialect = DIALECTS[name]
    weights = single_file(checkpoint, layout)
    shapes = lora(weights, name_of, *suffixes, rank=8)
    family = {"F": "flux1", "W": "wan", "Q": "qwen_image", "Z": "z_image"}[checkpoint[0]]
    family = "flux2" if checkpoint.startswith("FLUX.2") else family
    names = parse(shapes)
    assert (names.family, names.layout, names.dialect) == (family, layout, dialect)
    assert names.unmatched == ()
    matrices = {key.removesuffix(".weight") for key in weights if len(weights[key]) == 2}
    matrices = {layer for layer in matrices if f"{layer}.weight" in weights}
    assert names.modules.keys() == {name_of(layer) for layer in matrices}
    assert all(parts.keys() == {"down", "up"} for parts in names.modules.values())


def test_what_is_added_whole():
    shapes = {
        "diffusion_model.blocks.0.norm3.diff": (48,),
        "diffusion_model.blocks.0.norm3.diff_b": (48,),
        "diffusion_model.blocks.3.diff_m": (1, 6, 48),
        "diffusion_model.head.head.diff_b": (64,),
        "diffusion_model.patch_embedding.lora_down.weight": (4, 16, 1, 2, 2),
        "diffusion_model.patch_embedding.lora_up.weight": (48, 4, 1, 1, 1),
    }
    names = parse(shapes)
    assert (names.family, names.layout, names.unmatched) == ("wan", "wan", ())
    assert {module: set(parts) for module, parts in names.modules.items()} == {
        "diffusion_model.blocks.0.norm3": {"diff", "diff_b"},
        "diffusion_model.blocks.3": {"diff_m"},
        "diffusion_model.head.head": {"diff_b"},
        "diffusion_model.patch_embedding": {"down", "up"},
    }


@pytest.mark.parametrize(
    ("parts", "dialect"),
    [
        (("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"), "lokr"),
        (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"), "loha"),
    ],
)
def test_products_of_other_kinds(parts, dialect):
    shapes = {f"diffusion_model.double_blocks.7.img_attn.qkv.{part}": (4, 4) for part in parts}
    names = parse(shapes)
    assert (names.family, names.dialect) == ("flux1", dialect)
    assert names.modules["diffusion_model.double_blocks.7.img_attn.qkv"].keys() == set(parts)


def test_an_older_spelling_of_z_image():
    found = parse({f"diffusion_model.layers.3.attention.to_out{end}": (4, 4) for end in PEFT})
    assert (found.family, len(found.modules), found.unmatched) == ("z_image", 1, ())


def test_loras_of_other_models():
    weights = {f"input_blocks.{n}.1.proj_in.weight": (320, 320) for n in range(9)}
    assert parse(lora(weights, flat("lora_unet_"), *KOHYA, rank=4)) is None
    assert parse({}) is None
