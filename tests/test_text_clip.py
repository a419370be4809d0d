"""CLIP's text model against transformers' own, from folders that it wrote."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from jaxspd.errors import UsageError
from jaxspd.models.text.clip import ClipTextConfig
from tests.text_parity import (
    assert_as_near,
    assert_equal,
    clip,
    layer_programs,
    ours,
    random_ids,
    reopen,
    write,
)
from tests.tiny.common import change_json, randomise

VOCABULARY = 50
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 20,
    "bos_token_id": 0,
}
OFFICIAL = {"eos_token_id": 2, "hidden_act": "quick_gelu"}


def tiny(**options) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(**SIZES | OFFICIAL | options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tiny(), tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eos_token_id": 7, "hidden_act": "gelu", "num_attention_heads": 2, "layer_norm_eps": 1e-3},
        {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 1, "hidden_act": "gelu_new"},
    ],
)
@pytest.mark.parametrize("tokens", [20, 1])
def test_states_and_pooled_vector_are_transformers(options, tokens, tmp_path):
    folder = write(tiny(**options), tmp_path)
    ids, _ = random_ids(VOCABULARY, [tokens] * 3, tokens)
    reference = reopen(CLIPTextModel, folder)(torch.tensor(ids))
    states, pooled = ours(clip(folder), folder)(ids)
    assert_equal(states, reference.last_hidden_state)
    assert_equal(pooled, reference.pooler_output)


def test_padding_is_masked(folder):
    ids, mask = random_ids(VOCABULARY, [20, 6], 20)
    model = ours(clip(folder), folder)
    reference = reopen(CLIPTextModel, folder)(torch.tensor(ids), torch.tensor(mask))
    assert_equal(model(ids, mask)[0], reference.last_hidden_state)
    assert np.isfinite(model(ids, np.zeros_like(mask))[0]).all()


@pytest.mark.parametrize(
    ("end", "ids", "where"),
    [
        # The largest token, wherever it is
        (2, [[0, 9, 49, 3, 3], [0, 2, 5, 48, 48]], [2, 3]),
        # The first end token, which padding may repeat, larger ones or not; the beginning if there is none
        (7, [[0, 9, 7, 7, 7], [0, 7, 49, 48, 7], [0, 9, 9, 9, 9]], [2, 1, 0]),
    ],
)
def test_a_text_is_pooled_at_its_end(end, ids, where, tmp_path):
    folder = write(tiny(eos_token_id=end), tmp_path)
    ids = np.array(ids)
    states, pooled = ours(clip(folder), folder)(ids)
    np.testing.assert_array_equal(pooled, states[np.arange(len(ids)), np.array(where)])
    assert_equal(pooled, reopen(CLIPTextModel, folder)(torch.tensor(ids)).pooler_output)


def test_bfloat16_is_as_near_as_transformers(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    folder = write(tiny(**sizes), tmp_path, dtype=torch.bfloat16)
    ids, _ = random_ids(VOCABULARY, [20] * 4, 20)
    reference, half = (
        reopen(CLIPTextModel, folder, dtype)(torch.tensor(ids)) for dtype in (torch.float32, torch.bfloat16)
    )
    states, pooled = ours(clip(folder), folder, jnp.bfloat16)(ids)
    assert states.dtype == pooled.dtype == jnp.bfloat16
    assert_as_near(states, reference.last_hidden_state, half.last_hidden_state)
    assert_as_near(pooled, reference.pooler_output, half.pooler_output)


def test_files_of_other_names_hold_the_same(folder, tmp_path):
    ids, _ = random_ids(VOCABULARY, [20], 20)
    expected = ours(clip(folder), folder)(ids)
    tensors = load_file(folder / "model.safetensors")
    old = {f"text_model.{key}": tensor for key, tensor in tensors.items()}
    old["text_model.embeddings.position_ids"] = np.arange(20)[None]
    old["text_projection.weight"] = np.ones((8, 24), np.float32)
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for one, other in zip(ours(clip(tmp_path), tmp_path)(ids), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_projection_and_a_vision_tower_are_left_alone(tmp_path):
    ids, _ = random_ids(VOCABULARY, [20], 20)
    config = CLIPTextConfig(**SIZES | OFFICIAL, projection_dim=8)
    projected = write(CLIPTextModelWithProjection(config), tmp_path / "projected")
    reference = reopen(CLIPTextModelWithProjection, projected).text_model(torch.tensor(ids))
    assert_equal(ours(clip(projected), projected)(ids)[1], reference.pooler_output)

    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    whole = CLIPConfig(text_config=SIZES | OFFICIAL, vision_config=vision, projection_dim=8)
    model, folder = CLIPModel(whole), tmp_path / "whole"
    randomise(model.text_model, 0)
    model.save_pretrained(folder)
    reference = reopen(CLIPModel, folder).text_model(torch.tensor(ids))
    assert_equal(ours(clip(folder), folder)(ids)[1], reference.pooler_output)


def test_all_layers_are_one_program(folder):
    assert layer_programs(clip(folder)[0], np.zeros((1, 8), np.int32)) == (3, 1)


def test_defaults_are_the_official_classs(tmp_path):
    CLIPTextConfig().save_pretrained(tmp_path)
    assert ClipTextConfig.from_folder(tmp_path) == ClipTextConfig()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    assert ClipTextConfig.from_folder(tmp_path) == ClipTextConfig()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"hidden_act": "mish"}, "'mish'"),
        ({"num_attention_heads": 5}, "num_attention_heads 5"),
        ({"eos_token_id": [2, 7]}, "eos_token_id"),
        ({"model_type": "siglip_text_model"}, "siglip"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(options, told, tmp_path):
    CLIPTextConfig(**SIZES | OFFICIAL).save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", **options)
    with pytest.raises(UsageError) as refusal:
        ClipTextConfig.from_folder(tmp_path)
    assert told in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_text_longer_than_the_positions_is_refused(folder):
    with pytest.raises(UsageError, match="reads 20 tokens, not 21"):
        ours(clip(folder), folder)(np.zeros((1, 21), np.int32))


def test_tensors_stored_twice_or_unknown_are_refused(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors | {"logits.weight": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"left over: logits\.weight"):
        ours(clip(tmp_path), tmp_path)
    again = {"text_model.final_layer_norm.bias": tensors["final_layer_norm.bias"]}
    save_file(tensors | again, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="two names of one tensor"):
        ours(clip(tmp_path), tmp_path)
