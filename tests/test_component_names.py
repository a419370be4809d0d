"""VAEs and text encoders by their names: those of real files, proven by hashes of names and shapes."""

import re

import pytest

from jaxspd.convert.component_names import text_encoder_names, vae_names
from jaxspd.convert.identify import kind_of
from tests.test_official_keys import (
    T5_XXL,
    TEXT_ENCODERS,
    VAE_OF_FLUX1,
    VAES,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLWan,
    UMT5Config,
    UMT5EncoderModel,
    of_module,
    renamed,
    with_shapes,
)

LDM = (
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
)
FLUX2 = ((r"^quant_conv", "encoder.quant_conv"), (r"^post_quant_conv", "decoder.post_quant_conv"))
RESIDUAL = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
WAN = (
    (r"^quant_conv", "conv1"),
    (r"^post_quant_conv", "conv2"),
    (r"coder\.conv_in", "coder.conv1"),
    (r"norm_out", "head.0"),
    (r"conv_out", "head.2"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"middle.{2 * int(m[1])}"),
    (r"mid_block\.attentions\.0", "middle.1"),
    (r"down_blocks", "downsamples"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}"),
    (r"(?<=\d\.)(norm1|conv1|norm2|conv2)(?=\.)", lambda m: RESIDUAL[m[1]]),
    (r"conv_shortcut", "shortcut"),
)
UMT5 = (
    (r"^shared", "token_embedding"),
    (
        r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias",
        r"blocks.\1.pos_embedding.embedding",
    ),
    (r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention", r"blocks.\1.attn"),
    (r"^encoder\.block\.(\d+)\.layer\.(\d)\.layer_norm", lambda m: f"blocks.{m[1]}.norm{int(m[2]) + 1}"),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0", r"blocks.\1.ffn.gate.0"),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1", r"blocks.\1.ffn.fc1"),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo", r"blocks.\1.ffn.fc2"),
    (r"^encoder\.final_layer_norm", "norm"),
)


def written(key: str, names) -> str:
    for pattern, name in names:
        key = re.sub(pattern, name, key)
    return key


def ldm(make, *more):
    """A VAE of pictures as its authors store it: its attention as convolutions of one pixel."""
    shapes = {written(key, (*LDM, *more)): shape for key, shape in of_module(make).items()}
    return {
        key: (*shape, 1, 1) if "attn_1" in key and len(shape) == 2 else shape for key, shape in shapes.items()
    }


AUTHORS = {
    "FLUX.1's": (
        lambda: ldm(lambda: AutoencoderKL(**VAE_OF_FLUX1)),
        "21ea55f476dfc4fd135587abb59dfe5d",
        ("flux1", "ldm"),
    ),
    "FLUX.2's": (lambda: ldm(AutoencoderKLFlux2, *FLUX2), None, ("flux2", "ldm")),
    "Wan's": (
        lambda: {written(key, WAN): shape for key, shape in of_module(AutoencoderKLWan).items()},
        "ccc42284ea13e1ad04693284c7a09be6",
        ("wan", "wan"),
    ),
}


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
@pytest.mark.parametrize("vae", AUTHORS)
def test_vaes_as_their_authors_name_them(vae, prefix):
    make, md5, expected = AUTHORS[vae]
    shapes = make()
    assert md5 in (None, with_shapes(shapes))
    keys = {prefix + key for key in shapes}
    assert kind_of(keys) == "vae"
    names = vae_names(keys)
    assert (names.family, names.layout) == expected
    assert (set(names.matched), names.unmatched, names.refused) == (keys, [], None)
    assert vae_names(keys | {"decoder.strange"}).unmatched == ["decoder.strange"]


@pytest.mark.parametrize("vae", VAES)
def test_vaes_as_diffusers_names_them(vae):
    kind, options, _ = VAES[vae]
    keys = of_module(lambda: kind(**options)).keys()
    assert kind_of(keys) == "vae"
    assert (vae_names(keys).unmatched, vae_names(keys).refused) == ([], None)


def test_stable_diffusions_vae_is_refused():
    keys = of_module(AutoencoderKL).keys()
    assert "another model" in vae_names(keys).refused


FAMILIES = {
    "FLUX.1": "flux1",
    "Z-Imag": "z_image",
    "klein ": "flux2",
    "FLUX.2": "flux2",
    "Qwen-I": "qwen_image",
}


@pytest.mark.parametrize("prefix", ["", "text_encoders.any.transformer."])
@pytest.mark.parametrize("encoder", TEXT_ENCODERS)
def test_text_encoders(encoder, prefix):
    make, names, twice, _ = TEXT_ENCODERS[encoder]
    shapes = {prefix + renamed(key, names): shape for key, shape in of_module(make).items() if key != twice}
    assert kind_of(shapes) == "text_encoder"
    found = text_encoder_names(shapes, shapes.__getitem__)
    assert (found.family, found.layout) == (FAMILIES[encoder[:6]], "transformers")
    assert (len(found.matched), found.unmatched, found.refused) == (len(shapes), [], None)


def test_umt5_as_wans_authors_name_it():
    shapes = of_module(lambda: UMT5EncoderModel(UMT5Config(vocab_size=256_384, **T5_XXL)))
    del shapes["encoder.embed_tokens.weight"]
    found = text_encoder_names(shapes, shapes.__getitem__)
    assert (found.family, found.layout, found.unmatched) == ("wan", "transformers", [])
    own = {written(key, UMT5): shape for key, shape in shapes.items()}
    assert with_shapes(own) == "9c8818c2cbea55eca56c7b447df170da"
    assert kind_of(own) == "text_encoder"
    found = text_encoder_names(own, own.__getitem__)
    assert (found.family, found.layout, found.unmatched) == ("wan", "wan", [])
