"""The encoders of T5 and UMT5 against transformers' own, from folders that it wrote."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import T5Config as OfficialT5Config
from transformers import T5EncoderModel, T5ForConditionalGeneration, UMT5Config, UMT5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

from jaxspd.convert import text_t5
from jaxspd.convert.loader import flat_parameters
from jaxspd.errors import UsageError
from jaxspd.models.text.t5 import DEFAULTS, T5Config, T5Encoder, position_buckets
from tests.text_parity import (
    assert_as_near,
    assert_equal,
    layer_programs,
    ours,
    random_ids,
    reopen,
    split,
    t5,
    write,
)
from tests.tiny.common import change_json

VOCABULARY = 50
SIZES = {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_heads": 4}
GATED = {"feed_forward_proj": "gated-gelu"}


def tiny_t5(**options) -> T5EncoderModel:
    return T5EncoderModel(OfficialT5Config(**SIZES | GATED | options))


def tiny_umt5(**options) -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(**SIZES | GATED | options))


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    return write(tiny_t5(), tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def umt5_folder(tmp_path_factory):
    return write(tiny_umt5(), tmp_path_factory.mktemp("umt5"))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny_t5, {}),
        (tiny_t5, {"feed_forward_proj": "relu", "d_kv": 4, "num_heads": 3, "layer_norm_epsilon": 1e-3}),
        (tiny_t5, {"dense_act_fn": "gelu_pytorch_tanh", "feed_forward_proj": "gated-silu"}),
        (tiny_umt5, {}),
        (tiny_umt5, {"feed_forward_proj": "gelu", "num_layers": 1}),
        (tiny_umt5, {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}),
    ],
)
def test_states_are_transformers_with_a_mask_and_without(make, options, tmp_path):
    official = make(**options)
    folder = write(official, tmp_path)
    ids, mask = random_ids(VOCABULARY, [150, 3], 150)
    model, reference = ours(t5(folder), folder), reopen(type(official), folder)
    masked = reference(torch.tensor(ids), torch.tensor(mask)).last_hidden_state
    assert_equal(model(ids, mask), masked)
    assert_equal(model(ids), reference(torch.tensor(ids)).last_hidden_state)
    assert np.isfinite(model(ids, np.zeros_like(mask))).all()


@pytest.mark.parametrize("make", [tiny_t5, tiny_umt5])
def test_bfloat16_is_as_near_as_transformers(make, tmp_path):
    official = make(d_model=64, d_kv=16, d_ff=160)
    folder = write(official, tmp_path, dtype=torch.bfloat16)
    ids, mask = random_ids(VOCABULARY, [40, 40, 9], 40)
    reference, half = (
        reopen(type(official), folder, dtype)(torch.tensor(ids), torch.tensor(mask)).last_hidden_state
        for dtype in (torch.float32, torch.bfloat16)
    )
    states = ours(t5(folder), folder, jnp.bfloat16)(ids, mask)
    assert states.dtype == jnp.bfloat16
    assert_as_near(states, reference, half)


@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (8, 20), (64, 300), (30, 100)])
def test_distances_fall_into_the_official_buckets(buckets, longest):
    distance = torch.arange(700)[None] - torch.arange(700)[:, None]
    expected = T5Attention._relative_position_bucket(distance, True, buckets, longest)
    np.testing.assert_array_equal(position_buckets(700, buckets, longest), expected)


def test_t5_shares_the_first_layers_bias_and_umt5_has_one_a_layer(t5_folder, umt5_folder):
    for folder, paths in (
        (t5_folder, ["bias.table.embedding"]),
        (umt5_folder, [f"blocks.{number}.bias.table.embedding" for number in range(3)]),
    ):
        keys = load_file(folder / "model.safetensors").keys()
        assert sum("relative_attention_bias" in key for key in keys) == len(paths)
        _, state = split(t5(folder)[0])
        assert [p for p in flat_parameters(state) if "bias" in p] == paths


@pytest.mark.parametrize("names", ["both", "the other"])
def test_the_embedding_may_have_either_name(names, t5_folder, tmp_path):
    ids, _ = random_ids(VOCABULARY, [9], 9)
    tensors = load_file(t5_folder / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].copy()
    if names == "the other":
        del tensors["shared.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((t5_folder / "config.json").read_text())
    expected = ours(t5(t5_folder), t5_folder)(ids)
    np.testing.assert_array_equal(ours(t5(tmp_path), tmp_path)(ids), expected)


def test_a_decoder_is_left_alone(tmp_path):
    ids, _ = random_ids(VOCABULARY, [9], 9)
    folder = write(T5ForConditionalGeneration(OfficialT5Config(**SIZES | GATED)), tmp_path)
    reference = reopen(T5EncoderModel, folder)(torch.tensor(ids)).last_hidden_state
    assert_equal(ours(t5(folder), folder)(ids), reference)


def test_umt5_is_read_by_its_authors_names(umt5_folder, tmp_path):
    ids, mask = random_ids(VOCABULARY, [20, 6], 20)
    theirs = {rule.path: rule.official for rule in text_t5.WAN_RULES}
    stored = load_file(umt5_folder / "model.safetensors")
    tensors = {}
    for rule in text_t5.RULES:
        for number in range(3):
            if (key := rule.official.format(number)) in stored and rule.path in theirs:
                tensors[theirs[rule.path].format(number)] = stored[key]
    assert len(tensors) == len(stored)
    assert not tensors.keys() & stored.keys()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((umt5_folder / "config.json").read_text())
    make, names, _ = t5(tmp_path)
    states = ours((make, names, text_t5.rules_for(tensors)), tmp_path)(ids, mask)
    np.testing.assert_array_equal(states, ours(t5(umt5_folder), umt5_folder)(ids, mask))
    assert text_t5.rules_for(stored) is text_t5.RULES


def test_all_layers_are_one_program(t5_folder, umt5_folder):
    for folder in (t5_folder, umt5_folder):
        assert layer_programs(t5(folder)[0], np.zeros((1, 8), np.int32)) == (3, 1)


@pytest.mark.parametrize(("kind", "official"), [("t5", OfficialT5Config), ("umt5", UMT5Config)])
def test_defaults_are_the_official_classs(kind, official, tmp_path):
    official().save_pretrained(tmp_path)
    assert T5Config.from_folder(tmp_path) == DEFAULTS[kind]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    assert T5Config.from_folder(tmp_path) == DEFAULTS[kind]


def test_the_published_files_options_are_understood(tmp_path):
    # FLUX.1's says what its MLPs are without `feed_forward_proj`, Wan's says it in both ways.
    for name, given in (
        ("flux", {"model_type": "t5", "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True}),
        (
            "wan",
            {
                "model_type": "umt5",
                "dense_act_fn": "gelu_new",
                "feed_forward_proj": "gated-gelu",
                "is_gated_act": True,
                "scalable_attention": True,
            },
        ),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(given))
        config = T5Config.from_folder(folder)
        assert (config.dense_act_fn, config.is_gated_act) == (given["dense_act_fn"], True)


@pytest.mark.parametrize(
    ("options", "told"), [({"model_type": "mt5"}, "'mt5'"), ({"dense_act_fn": "mish"}, "'mish'")]
)
def test_what_cannot_be_served_is_refused_in_one_line(options, told, tmp_path):
    OfficialT5Config(**SIZES).save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", **options)
    with pytest.raises(UsageError) as refusal:
        T5Config.from_folder(tmp_path)
    assert told in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_embedded_tokens_go_the_same_way(umt5_folder):
    # As when the table's rows are looked up where it lies.
    ids, mask = random_ids(VOCABULARY, [9, 4], 9)
    table = load_file(umt5_folder / "model.safetensors")["shared.weight"]
    make, names, rules = t5(umt5_folder)

    class Embedded(T5Encoder):
        def __call__(self, x, mask):
            return self.encode(x, mask)

    embedded = ours((lambda **options: Embedded(*make.args, **options), names, rules), umt5_folder)
    np.testing.assert_allclose(
        embedded(table[ids], mask), ours(t5(umt5_folder), umt5_folder)(ids, mask), atol=1e-5
    )
