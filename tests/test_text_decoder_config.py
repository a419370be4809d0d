"""What decoder-only language models' configurations say, and which are refused."""

import json

import pytest
from transformers import Mistral3Config, Qwen2_5_VLConfig, Qwen3Config

from jaxspd.errors import UsageError
from jaxspd.models.text.decoder_config import DecoderConfig
from tests.tiny.common import change_json


@pytest.mark.parametrize(
    ("official", "kind"),
    [(Qwen3Config, "qwen3"), (Qwen2_5_VLConfig, "qwen2_5_vl"), (Mistral3Config, "mistral3")],
)
def test_defaults_are_the_official_classs(official, kind, tmp_path):
    official().save_pretrained(tmp_path)
    config = DecoderConfig.from_folder(tmp_path)
    # With every option as the class fills it in, and with none.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    assert DecoderConfig.from_folder(tmp_path) == config
    text = official().get_text_config()
    assert (config.num_hidden_layers, config.rms_norm_eps) == (text.num_hidden_layers, text.rms_norm_eps)


def test_defaults_of_mistral_inside_mistral3_are_mistrals(tmp_path):
    official = Mistral3Config(text_config={"model_type": "mistral"})
    official.save_pretrained(tmp_path)
    config = DecoderConfig.from_folder(tmp_path)
    change_json(tmp_path / "config.json", text_config={"model_type": "mistral"})
    assert DecoderConfig.from_folder(tmp_path) == config


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"model_type": "mistral3", "text_config": {"model_type": "ministral3"}}, "'ministral3'"),
        ({"use_sliding_window": True}, "sliding windows"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding windows"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_parameters": {"type": "linear", "rope_theta": 1e4}}, "'linear'"),
        ({"hidden_act": "mish"}, "'mish'"),
        ({"num_key_value_heads": 3}, "3 groups"),
        ({"head_dim": 7}, "7 channels"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(options, told, tmp_path):
    Qwen3Config(num_hidden_layers=4, num_attention_heads=4).save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", **options)
    with pytest.raises(UsageError) as refusal:
        DecoderConfig.from_folder(tmp_path)
    assert told in str(refusal.value)
    assert "\n" not in str(refusal.value)
