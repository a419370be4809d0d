"""What transformers and diffusers would accept in silence is refused before anything is computed."""

import json
import re
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from jaxspd.components.tokenizer import open_tokenizer
from jaxspd.convert import orbax_store
from jaxspd.convert.checkpoint import Checkpoint
from jaxspd.convert.pipeline_folder import convert_pipeline
from jaxspd.errors import UsageError
from jaxspd.families import open_family
from jaxspd.generator import DiffGenerator
from tests.components import components
from tests.tiny import change_json

FAMILIES = [
    "flux1_folder",
    "klein_folder",
    "flux2_dev_folder",
    "qwen_image_folder",
    "wan_folder",
    "z_image_folder",
]
TOKENIZERS = [("flux1_folder", "tokenizer_2"), *((family, "tokenizer") for family in FAMILIES)]
ENCODERS = [("flux1_folder", "text_encoder_2"), *((family, "text_encoder") for family in FAMILIES)]
PARTS = [*ENCODERS, *((family, "vae") for family in FAMILIES)]
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "spiece.model")


@pytest.fixture
def copy(request, tmp_path):
    """A copy of a family's folder, to be damaged."""
    return lambda family: shutil.copytree(request.getfixturevalue(family), tmp_path / "copy")


@pytest.fixture
def uncomputed(monkeypatch):
    """Fails the test if a text is encoded or weights are read."""

    def refuse(*_, **__):
        raise AssertionError("something was computed")

    for module in ("flux1", "flux2", "qwen_image", "wan", "z_image"):
        monkeypatch.setattr(f"jaxspd.families.{module}.Family.encode", refuse)
    monkeypatch.setattr(Checkpoint, "read", refuse)


def weights(folder):
    (path,) = folder.glob("*.safetensors")
    return path


def change(folder, values):
    """Puts tensors into a part's file, or takes out those that are None."""
    path = weights(folder)
    tensors = {k: v for k, v in (load_file(path) | values).items() if v is not None}
    save_file(tensors, path, metadata={"format": "pt"})


# Tokenizers.


@pytest.mark.parametrize(("family", "part"), TOKENIZERS)
def test_a_tokenizer_without_its_vocabulary(refused, copy, uncomputed, family, part):
    folder = copy(family)
    for name in VOCABULARIES:
        (folder / part / name).unlink(missing_ok=True)
    line = refused(model=folder)
    assert re.search(rf"{part} has no vocabulary .*download", line)


@pytest.mark.parametrize(("family", "part"), TOKENIZERS)
def test_a_truncated_tokenizer(refused, copy, uncomputed, family, part):
    folder = copy(family)
    path = folder / part / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-200])
    assert re.search(rf"{part}/tokenizer.json is no valid JSON; download", refused(model=folder))


@pytest.mark.parametrize(
    "content", ["{}", '{"model": {}}', '{"model": {"vocab": []}}', '{"model": {"vocab": {}}}']
)
def test_a_tokenizer_of_no_words(refused, copy, uncomputed, content):
    folder = copy("z_image_folder")
    (folder / "tokenizer" / "tokenizer.json").write_text(content)
    assert "tokenizer.json holds no vocabulary" in refused(model=folder)


@pytest.mark.parametrize("family", ["flux1_folder", "klein_folder", "qwen_image_folder", "z_image_folder"])
@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_half_of_a_pair_of_vocabulary_files(refused, copy, uncomputed, family, name):
    folder = copy(family)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / name).unlink()
    assert f"{name} is missing" in refused(model=folder)


def test_a_damaged_sentencepiece_model(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"\x0a\xff damaged")
    with pytest.raises(UsageError, match=r"spiece.model is damaged"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize(("family", "part"), TOKENIZERS)
def test_a_tokenizer_of_another_model(refused, copy, uncomputed, family, part):
    folder = copy(family)
    path = folder / part / "tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"].append({**values["added_tokens"][-1], "id": 40_000, "content": "<more>"})
    path.write_text(json.dumps(values))
    assert re.search(
        rf"{part} has tokens up to \d+, and .* a table of \d+; they do not belong together",
        refused(model=folder),
    )


@pytest.mark.parametrize(("family", "part"), TOKENIZERS)
def test_whoever_opens_a_tokenizer_without_vocabulary(copy, family, part):
    folder = copy(family) / part
    assert open_tokenizer(folder)
    for name in VOCABULARIES:
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(UsageError, match="has no vocabulary"):
        open_tokenizer(folder)


@pytest.mark.parametrize("wrong", [{"model_max_length": "x"}, {"pad_token": None}, {"eos_token": [3]}])
def test_a_tokenizer_with_a_wrong_configuration(copy, wrong):
    folder = copy("flux1_folder")
    change_json(folder / "tokenizer" / "tokenizer_config.json", **wrong)
    with pytest.raises(UsageError, match="tokenizer cannot be loaded"):
        components(folder).encode_text(["a lake"])


@pytest.mark.parametrize("family", ["klein_folder", "flux2_dev_folder", "z_image_folder"])
def test_a_tokenizer_without_its_template(copy, family):
    folder = copy(family)
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(UsageError, match=r"tokenizer lacks a chat template"):
        components(folder).encode_text(["a lake"])


# Weights that PyTorch loads.

KINDS = {torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8", torch.uint8: "U8"}


@pytest.mark.parametrize(
    ("family", "part", "kind"),
    [
        *((family, part, torch.float8_e4m3fn) for family, part in PARTS),
        *(("flux1_folder", "text_encoder_2", kind) for kind in KINDS),
    ],
)
def test_quantised_weights(copy, uncomputed, family, part, kind):
    folder = copy(family)
    key, value = next((k, v) for k, v in load_file(weights(folder / part)).items() if v.ndim > 1)
    change(folder / part, {key: value.to(kind)})
    with pytest.raises(UsageError, match=f"{part} stores weights as {KINDS[kind]};"):
        DiffGenerator.from_pretrained(folder)


def test_whoever_loads_quantised_weights(copy):
    folder = copy("flux1_folder")
    for part, key in (("text_encoder_2", "shared.weight"), ("vae", "encoder.conv_in.weight")):
        change(folder / part, {key: load_file(weights(folder / part))[key].to(torch.float8_e4m3fn)})
    opened = components(folder)
    with pytest.raises(UsageError, match="text_encoder_2 stores weights as F8_E4M3"):
        opened.encode_text(["a lake"])
    with pytest.raises(UsageError, match="vae stores weights as F8_E4M3"):
        opened.encode(np.zeros((1, 1, 64, 64, 3), np.uint8))


ADDED = {
    # Of a scaled T5 whose weights were cast to a type that is known.
    "encoder.block.0.layer.0.SelfAttention.q.scale_weight": torch.ones(1),
    "scaled_fp8": torch.ones(2),
}


@pytest.mark.parametrize(("family", "part"), PARTS)
def test_weights_that_nothing_reads(copy, uncomputed, family, part):
    folder = copy(family)
    change(folder / part, ADDED)
    with pytest.raises(UsageError, match=rf"{part} does not fit its config.json: 2 left over: .*scaled_fp8"):
        DiffGenerator.from_pretrained(folder)


@pytest.mark.parametrize(("family", "part"), PARTS)
def test_weights_that_are_missing_or_misshapen(copy, family, part):
    folder = copy(family)
    # Not a table of tokens, which may be tied to another; nor a head, which not all classes read.
    found = load_file(weights(folder / part))
    key = next(k for k in sorted(found) if found[k].ndim > 1 and ("layer" in k or "block" in k))
    change(folder / part, {key: found[key][1:].clone()})
    with pytest.raises(UsageError, match=rf"{part} does not fit its config.json: 1 misshapen: .*"):
        components(folder).check()
    change(folder / part, {key: None})
    with pytest.raises(UsageError, match=rf"{part} does not fit its config.json: 1 missing: .*"):
        components(folder).check()


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_the_weights_is_read(request, monkeypatch, family):
    """Files of headers alone: what they hold is never touched."""
    monkeypatch.setattr(Checkpoint, "read", None)
    components(request.getfixturevalue(family)).check()


def test_a_whole_clip_is_a_text_encoder(copy, flux1_folder):
    """What a model's files hold beside its text encoder, counters included, is passed over."""
    folder = copy("flux1_folder")
    own = load_file(weights(folder / "text_encoder"))
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = json.loads((folder / "text_encoder" / "config.json").read_text())
    whole = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    )
    tensors = {k: v for k, v in whole.state_dict().items() if not k.startswith("text_model.")}
    tensors |= {f"text_model.{k.removeprefix('text_model.')}": v for k, v in own.items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file({k: v.contiguous() for k, v in tensors.items()}, weights(folder / "text_encoder"))
    expected = components(flux1_folder).encode_text(["a lake"])
    for name, values in components(folder).encode_text(["a lake"]).items():
        np.testing.assert_array_equal(values, expected[name])


def test_the_table_of_umt5_is_the_one_stored(copy, wan_folder):
    """Official files store it as `shared.weight` alone, and their configuration says that nothing is tied."""
    folder = copy("wan_folder")
    change_json(folder / "text_encoder" / "config.json", tie_word_embeddings=False)
    stored = load_file(weights(folder / "text_encoder"))
    assert "encoder.embed_tokens.weight" not in stored
    ours, expected = (components(one).encode_text(["a lake"])["text"] for one in (folder, wan_folder))
    np.testing.assert_array_equal(ours, expected)


# The parts beside one another.


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("flux1_folder", "pooled_projection_dim", 20),
        ("flux1_folder", "joint_attention_dim", 20),
        ("klein_folder", "joint_attention_dim", 39),
        ("klein_folder", "joint_attention_dim", 37),
        ("flux2_dev_folder", "joint_attention_dim", 39),
        ("qwen_image_folder", "joint_attention_dim", 20),
        ("wan_folder", "text_dim", 20),
        ("z_image_folder", "cap_feat_dim", 24),
    ],
)
def test_an_encoder_of_another_width(copy, family, field, value):
    folder = copy(family)
    change_json(folder / "transformer" / "config.json", **{field: value})
    with pytest.raises(UsageError, match=r"channels, and the transformer reads .* do not belong together"):
        components(folder).check()


def test_an_encoder_with_too_few_layers(copy):
    folder = copy("klein_folder")
    path = weights(folder / "text_encoder")
    kept = {k: v for k, v in load_file(path).items() if int((re.findall(r"\d+", k) or [0])[0]) < 20}
    save_file(kept, path, metadata={"format": "pt"})
    change_json(folder / "text_encoder" / "config.json", num_hidden_layers=20, layer_types=None)
    with pytest.raises(UsageError, match="has 20 layers, but hidden states 9, 18, 27 are read"):
        components(folder).check()


def test_a_decoder_of_another_scale(copy):
    folder = copy("wan_folder")
    change_json(folder / "vae" / "config.json", scale_factor_spatial=16)
    with pytest.raises(UsageError, match=r"vae/config.json: scale_factor_spatial must be 8, not 16"):
        components(folder).check()


# The transformer.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_transformer_in_fp8(copy, uncomputed, family):
    folder = copy(family)
    key, value = next((k, v) for k, v in load_file(weights(folder / "transformer")).items() if v.ndim == 2)
    change(
        folder / "transformer",
        {key: value.to(torch.float8_e4m3fn), f"{key[:-7]}.scale_weight": torch.ones(1)},
    )
    with pytest.raises(UsageError, match="transformer stores weights as F8_E4M3"):
        DiffGenerator.from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_transformer_with_weights_left_over(copy, uncomputed, family):
    folder = copy(family)
    change(folder / "transformer", {"lora.down": torch.ones(1)})
    with pytest.raises(UsageError, match=r"1 left over: lora\.down"):
        DiffGenerator.from_pretrained(folder)


def test_a_converted_transformer_that_does_not_fit(flux1_folder, tmp_path, monkeypatch):
    folder = tmp_path / "converted"
    convert_pipeline(open_family(flux1_folder), folder)
    monkeypatch.setattr(orbax_store, "load_transformer", None)
    change_json(folder / "transformer" / "config.json", num_layers=3)
    with pytest.raises(UsageError, match=r"orbax does not fit its config.json .*convert it again"):
        DiffGenerator.from_pretrained(folder)


def test_an_older_conversion(flux1_folder, tmp_path, monkeypatch):
    """Its arrays lie in folders, those of all layers together."""
    folder = tmp_path / "converted"
    convert_pipeline(open_family(flux1_folder), folder)
    store = folder / "transformer" / orbax_store.NAME
    shutil.rmtree(store)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(store, {"blocks": {"weight": (np.zeros(3), np.zeros(3))}, "out": np.zeros(3)})
    monkeypatch.setattr(orbax_store, "load_transformer", None)
    with pytest.raises(UsageError, match=r"does not fit its config.json .*convert it again"):
        DiffGenerator.from_pretrained(folder)


# What a VAE's configuration leaves out.


@pytest.mark.parametrize("family", ["flux1_folder", "z_image_folder"])
@pytest.mark.parametrize("absent", [False, True])
def test_a_vae_without_a_shift(copy, family, absent):
    folder = copy(family)
    path = folder / "vae" / "config.json"
    latents = np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)
    pixels = np.random.default_rng(1).integers(0, 255, (1, 1, 64, 64, 3), np.uint8)

    def both(**values):
        change_json(path, **values)
        opened = components(folder)
        return opened.decode(latents), opened.encode(pixels)

    shifted, zero = both(shift_factor=0.5), both(shift_factor=0.0)
    assert (shifted[0] != zero[0]).any()
    if absent:
        values = json.loads(path.read_text())
        del values["shift_factor"]
        path.write_text(json.dumps(values))
    found = both() if absent else both(shift_factor=None)
    for one, other in zip(found, zero, strict=True):
        np.testing.assert_array_equal(one, other)
