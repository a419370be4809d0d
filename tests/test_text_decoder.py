"""Decoder-only language models against transformers' own, from folders that it wrote."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from jaxspd.convert.checkpoint import Checkpoint
from jaxspd.convert.loader import load_parameters
from jaxspd.convert.text_names import Renamed
from jaxspd.errors import UsageError
from jaxspd.models.rotary import text_turns
from jaxspd.runtime.layerwise import Layerwise
from tests.text_parity import (
    assert_as_near,
    assert_equal,
    decoder,
    layer_programs,
    ours,
    random_ids,
    reopen,
    split,
    write,
)
from tests.tiny.common import change_json

VOCABULARY = 50
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}


def qwen3(**options) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES | {"head_dim": 12} | options))


def qwen2_5_vl(**options) -> Qwen2_5_VLForConditionalGeneration:
    text = SIZES | options
    quarter = text["hidden_size"] // text["num_attention_heads"] // 8
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [2 * quarter, quarter, quarter]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=QWEN_VISION)
    return Qwen2_5_VLForConditionalGeneration(config)


def mistral3(**options) -> Mistral3ForConditionalGeneration:
    text = {"model_type": "mistral", "head_dim": 12, "sliding_window": None}
    config = Mistral3Config(text_config=text | SIZES | options, vision_config=PIXTRAL, image_token_index=3)
    return Mistral3ForConditionalGeneration(config)


MODELS = pytest.mark.parametrize("make", [qwen3, qwen2_5_vl, mistral3])


def hidden_states(model, ids, mask=None):
    return model.model(
        input_ids=torch.tensor(ids),
        attention_mask=None if mask is None else torch.tensor(mask),
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (qwen3, {}),
        (qwen3, {"attention_bias": True, "num_key_value_heads": 4, "tie_word_embeddings": True}),
        (qwen3, {"num_key_value_heads": 1, "hidden_act": "gelu", "rms_norm_eps": 1e-3}),
        (qwen2_5_vl, {}),
        (qwen2_5_vl, {"num_key_value_heads": 4, "num_hidden_layers": 1}),
        (mistral3, {}),
        (mistral3, {"head_dim": None, "num_key_value_heads": 4, "rope_parameters": {"rope_theta": 1e9}}),
        (mistral3, {"sliding_window": 5}),
    ],
)
def test_every_state_is_transformers_on_either_side_padded(make, options, tmp_path):
    official = make(**options)
    folder = write(official, tmp_path)
    layers = official.config.get_text_config().num_hidden_layers
    model, reference = ours(decoder(folder, range(layers + 1)), folder), reopen(type(official), folder)
    for left in (False, True):
        ids, mask = random_ids(VOCABULARY, [40, 7], 40, left)
        states, expected = model(ids, mask), hidden_states(reference, ids, mask)
        assert len(states) == len(expected) == layers + 1
        # Padding's own states too: FLUX.2 reads them.
        for one, theirs in zip(states, expected, strict=True):
            assert_equal(one, theirs)


@MODELS
def test_without_a_mask_padding_is_text(make, tmp_path):
    official = make()
    folder = write(official, tmp_path)
    ids, _ = random_ids(VOCABULARY, [17], 17)
    expected = hidden_states(reopen(type(official), folder), ids)[-1]
    assert_equal(ours(decoder(folder), folder)(ids)[0], expected)


@MODELS
def test_a_text_of_padding_alone_gives_numbers(make, tmp_path):
    folder = write(make(), tmp_path)
    ids, mask = random_ids(VOCABULARY, [8, 0], 8)
    (states,) = ours(decoder(folder), folder)(ids, mask)
    assert np.isfinite(states).all()


def test_long_texts_turn_as_far(tmp_path):
    folder = write(qwen3(rope_parameters={"rope_theta": 1e6}, head_dim=64), tmp_path)
    ids, mask = random_ids(VOCABULARY, [512], 512)
    expected = hidden_states(reopen(Qwen3ForCausalLM, folder), ids, mask)[-1]
    assert_equal(ours(decoder(folder), folder)(ids, mask)[0], expected)


@pytest.mark.parametrize(("head_dim", "theta"), [(128, 1e6), (128, 1e9), (64, 1e4)])
def test_texts_turn_by_the_officials_angles_up_to_rounding(head_dim, theta):
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))
    expected = torch.arange(1024.0)[:, None] * frequencies
    cos, sin = (part[0, :, 0] for part in text_turns(1024, head_dim, theta))
    # Two units in an angle's last place, and one in that of its cosine or sine.
    bound = 2**-23 * (2 * expected + 1).numpy()
    for part, theirs in ((cos, expected.cos()), (sin, expected.sin())):
        assert (np.abs(part - theirs.numpy()) <= bound).all()


@MODELS
def test_bfloat16_is_as_near_as_transformers(make, tmp_path):
    official = make(hidden_size=64, intermediate_size=160)
    folder = write(official, tmp_path, dtype=torch.bfloat16)
    ids, mask = random_ids(VOCABULARY, [40, 40, 9], 40)
    reference, half = (
        hidden_states(reopen(type(official), folder, dtype), ids, mask)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for number, state in zip(
        (2, 4), ours(decoder(folder, (2, 4)), folder, jnp.bfloat16)(ids, mask), strict=True
    ):
        assert state.dtype == jnp.bfloat16
        assert_as_near(state, reference[number], half[number])


@pytest.mark.parametrize(
    ("make", "states", "needed"),
    [(qwen3, (-2,), 3), (qwen3, (3, 0, 3), 3), (qwen2_5_vl, (2,), 2), (mistral3, (1, 3), 3)],
)
def test_layers_after_the_last_state_are_not_needed(make, states, needed, tmp_path):
    folder = write(make(), tmp_path / "whole")
    ids, mask = random_ids(VOCABULARY, [9, 4], 9)
    expected = ours(decoder(folder, range(5)), folder)(ids, mask)
    tensors = {
        key: tensor
        for key, tensor in load_file(folder / "model.safetensors").items()
        if not any(f"layers.{number}." in key for number in range(needed, 4))
        and not key.endswith(("model.norm.weight", "lm_head.weight"))
    }
    short = tmp_path / "short"
    short.mkdir()
    save_file(tensors, short / "model.safetensors")
    (short / "config.json").write_text((folder / "config.json").read_text())
    found = ours(decoder(short, states), short)(ids, mask)
    for number, state in zip(states, found, strict=True):
        np.testing.assert_allclose(state, expected[number], atol=1e-6)


@pytest.mark.parametrize(
    ("make", "old", "new"),
    [
        (qwen3, "model.", ""),
        (qwen3, "model.", "language_model.model."),
        (mistral3, "language_model.model.", "model.language_model."),
        (qwen2_5_vl, "model.", "model.language_model."),
    ],
)
def test_files_of_other_names_hold_the_same(make, old, new, tmp_path):
    folder = write(make(), tmp_path / "old")
    stored = load_file(folder / "model.safetensors")
    tensors = {
        new + key.removeprefix(old) if key.startswith(old) else key: tensor for key, tensor in stored.items()
    }
    assert tensors.keys() != stored.keys()
    other = tmp_path / "new"
    other.mkdir()
    save_file(tensors, other / "model.safetensors")
    (other / "config.json").write_text((folder / "config.json").read_text())
    ids, mask = random_ids(VOCABULARY, [9, 4], 9)
    expected = ours(decoder(folder), folder)(ids, mask)
    np.testing.assert_array_equal(ours(decoder(other), other)(ids, mask), expected)


def test_a_model_without_head_is_read(tmp_path):
    folder = write(Qwen3Model(Qwen3Config(**SIZES)), tmp_path)
    ids, mask = random_ids(VOCABULARY, [9, 4], 9)
    expected = reopen(Qwen3Model, folder)(torch.tensor(ids), torch.tensor(mask)).last_hidden_state
    assert_equal(ours(decoder(folder), folder)(ids, mask)[0], expected)


def test_older_configurations_are_understood(tmp_path):
    ids, mask = random_ids(VOCABULARY, [30, 4], 30)
    # The base of the rotary embedding stood by itself,
    folder = write(qwen3(rope_parameters={"rope_theta": 1e6}), tmp_path / "qwen3")
    expected = ours(decoder(folder), folder)(ids, mask)
    change_json(folder / "config.json", rope_parameters=None, rope_scaling=None, rope_theta=1000000)
    np.testing.assert_array_equal(ours(decoder(folder), folder)(ids, mask), expected)
    assert_equal(expected[0], hidden_states(reopen(Qwen3ForCausalLM, folder), ids, mask)[-1])

    # and the options of Qwen2.5-VL's text half beside the others.
    folder = write(qwen2_5_vl(), tmp_path / "qwen2_5_vl")
    expected = ours(decoder(folder), folder)(ids, mask)
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    flat = text | config | {"rope_theta": 1e6, "sliding_window": 8, "use_sliding_window": False}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 1, 1]}
    del flat["rope_parameters"], flat["layer_types"]
    (folder / "config.json").write_text(json.dumps(flat))
    np.testing.assert_array_equal(ours(decoder(folder), folder)(ids, mask), expected)
    reference = reopen(Qwen2_5_VLForConditionalGeneration, folder)
    assert_equal(expected[0], hidden_states(reference, ids, mask)[-1])


@MODELS
def test_all_layers_are_one_program(make, tmp_path):
    folder = write(make(), tmp_path)
    ids = np.zeros((1, 8), np.int32)
    assert layer_programs(decoder(folder, (1, 2, 4))[0], ids) == (4, 1)
    assert layer_programs(decoder(folder, (1, 3))[0], ids) == (3, 1)


def test_layers_may_be_run_one_by_one(tmp_path):
    folder = write(mistral3(), tmp_path)
    ids, mask = random_ids(VOCABULARY, [9, 4], 9, left=True)
    make, names, rules = opened = decoder(folder, (1, 3))
    graph, state = split(make)
    parameters = load_parameters(Renamed(Checkpoint(folder, "model"), names), state, rules)
    inputs = parameters, jnp.asarray(ids), jnp.asarray(mask)
    layerwise = Layerwise(lambda p, *rest: nnx.merge(graph, p)(*rest), *inputs)
    for one, expected in zip(layerwise(*inputs), ours(opened, folder)(ids, mask), strict=True):
        np.testing.assert_allclose(one, expected, atol=1e-6)


def test_missing_and_unknown_tensors_are_refused(tmp_path):
    folder = write(qwen3(), tmp_path / "whole")
    with pytest.raises(UsageError, match="has 4 layers, but hidden states 1, 5 are read"):
        decoder(folder, (1, 5))
    stored = load_file(folder / "model.safetensors")
    path = folder / "model.safetensors"
    save_file({key: t for key, t in stored.items() if "layers.1.mlp.up" not in key}, path)
    with pytest.raises(UsageError, match=r"missing: layers\.1\.mlp\.up_proj\.weight"):
        ours(decoder(folder), folder)
    save_file(stored | {"model.layers.4.mlp.up_proj.weight": np.ones(1, np.float32)}, path)
    with pytest.raises(UsageError, match=r"left over: layers\.4\.mlp\.up_proj\.weight"):
        ours(decoder(folder), folder)
    change_json(folder / "config.json", attention_bias=True)
    save_file(stored, path)
    with pytest.raises(UsageError, match="16 missing"):
        ours(decoder(folder), folder)
