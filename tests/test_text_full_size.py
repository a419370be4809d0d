"""Text encoders of published size, without their weights: every key, every shape."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers import T5Config as OfficialT5Config

from jaxspd.convert import text_clip, text_decoder, text_t5
from jaxspd.convert.loader import assign, flat_parameters
from tests.text_parity import clip, decoder, split, t5

XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
UMT5 = UMT5Config(vocab_size=256384, **XXL)
QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
QWEN3_8B = QWEN3_4B | {"hidden_size": 4096, "intermediate_size": 12288}
QWEN2_5_VL = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
# What Wan's authors call UMT5's parts; the order of replacement matters.
WAN_NAMES = {
    "shared.": "token_embedding.",
    "encoder.block.": "blocks.",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.0.SelfAttention": "attn",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
    "layer.0.layer_norm": "norm1",
    "layer.1.layer_norm": "norm2",
    "encoder.final_layer_norm": "norm",
}


def wan_name(key: str) -> str | None:
    for theirs, own in WAN_NAMES.items():
        key = key.replace(theirs, own)
    return one_embedding(key)


def one_embedding(key: str) -> str | None:
    return None if key == "encoder.embed_tokens.weight" else key


def mistral_name(key: str) -> str:
    key = re.sub(r"^model\.language_model\.|^(?=lm_head)", "language_model.model.", key)
    return key.replace("language_model.model.lm_head", "language_model.lm_head").removeprefix("model.")


@dataclass(frozen=True)
class Published:
    """A published text encoder: its class, its options, the MD5 of its keys and shapes, how its file names
    what the class calls a key (None: not stored), and which hidden states pipelines read.
    """

    model: type
    config: PreTrainedConfig
    md5: str
    opened: Callable[..., Any]
    name: Callable[[str], str | None] = lambda key: key
    states: tuple[int, ...] | None = None


PUBLISHED = {
    "FLUX.1: CLIP": Published(
        CLIPTextModel,
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, eos_token_id=2),
        "94eefa3dac9cec93cb1ebaf1747d7b78",
        clip,
        "text_model.{}".format,
    ),
    "FLUX.1: T5-XXL": Published(
        T5EncoderModel, OfficialT5Config(**XXL), "22540b49eaedbc2f2784b2091a234c7c", t5, one_embedding
    ),
    "Wan: UMT5-XXL, its authors' file": Published(
        UMT5EncoderModel, UMT5, "9c8818c2cbea55eca56c7b447df170da", t5, wan_name
    ),
    "Z-Image: Qwen3-4B": Published(
        Qwen3ForCausalLM,
        Qwen3Config(**QWEN3_4B),
        "0f050f62a88876fea6eae0a18dac5a2e",
        decoder,
        lambda key: None if key == "lm_head.weight" else key,
        (-2,),
    ),
    "FLUX.2 [klein] 9B: Qwen3-8B": Published(
        Qwen3ForCausalLM,
        Qwen3Config(**QWEN3_8B),
        "9195f3ea256fcd0ae6d929c203470754",
        decoder,
        states=(9, 18, 27),
    ),
    "FLUX.2 [dev]: Mistral 3": Published(
        Mistral3ForConditionalGeneration,
        Mistral3Config(),
        "28fca3d8e5bf2a2d1271748a773f6757",
        decoder,
        mistral_name,
        (10, 20, 30),
    ),
    "Qwen-Image: Qwen2.5-VL": Published(
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig(
            text_config=QWEN2_5_VL, vision_config={"hidden_size": 1280, "out_hidden_size": 3584}
        ),
        "8004730443f55db63092006dd9f7110e",
        decoder,
        lambda key: key.replace("model.visual.", "visual.").replace("model.language_model.", "model."),
        (-1,),
    ),
}
OTHER_HALVES = r"visual|vision_tower|multi_modal_projector|(language_model\.)?lm_head"
# Published as lists of keys without shapes.
UMT5_KEYS = "049b6e27c2808bd6245cef436edeb63c"


def md5(texts) -> str:
    return hashlib.md5(",".join(sorted(texts)).encode()).hexdigest()


def stored_shapes(one: Published) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = one.model(one.config)
    named = ((one.name(key), tuple(tensor.shape)) for key, tensor in model.state_dict().items())
    return {key: shape for key, shape in named if key is not None}


def assert_fits(shapes, opened, rules) -> dict[str, str]:
    """Every parameter has one stored tensor of its shape, every tensor that is read one parameter; returns
    what is read.
    """
    make, names_of, _ = opened
    abstract = flat_parameters(split(make, jnp.bfloat16)[1])
    stored = names_of(set(shapes))
    table = assign(set(stored), lambda name: shapes[stored[name]], abstract, rules)
    assert set(table) == set(abstract)
    assert Counter(table.values()) == Counter(stored.keys())
    total = sum(int(np.prod(p.shape)) for p in jax.tree.leaves(abstract))
    assert total == sum(int(np.prod(shapes[key])) for key in stored.values())
    return stored


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_fit_key_by_key(name, tmp_path: Path):
    one = PUBLISHED[name]
    shapes = stored_shapes(one)
    sized = (f"{key}:{'_'.join(map(str, shape))}" for key, shape in shapes.items())
    assert md5([*sized, *shapes]) == one.md5

    one.config.save_pretrained(tmp_path)
    rules = text_t5.rules_for(shapes) if one.opened is t5 else one.opened(tmp_path)[2]
    read = assert_fits(shapes, one.opened(tmp_path), rules)
    if one.states is None:
        assert len(read) == len(shapes)
        return
    # All of the text half, whose layers these are, and nothing of the rest.
    half = {
        key
        for key in shapes
        if not re.match(r"visual|vision_tower|multi_modal|(language_model\.)?lm_head", key)
    }
    assert set(read.values()) == half

    some = assert_fits(shapes, one.opened(tmp_path, one.states), rules)
    layers = one.config.get_text_config().num_hidden_layers
    built = max(state + layers + 1 if state < 0 else state for state in one.states)
    later = {
        key for key in half if (found := re.search(r"\.layers\.(\d+)\.", key)) and int(found[1]) >= built
    }
    last = {key for key in half if re.search(r"model\.norm\.", key)} if built < layers else set()
    assert half - set(some.values()) == later | last


def test_umt5_in_transformers_names_fits_too(tmp_path: Path):
    one = Published(UMT5EncoderModel, UMT5, "", t5, one_embedding)
    shapes = stored_shapes(one)
    assert md5(shapes) == UMT5_KEYS
    UMT5.save_pretrained(tmp_path)
    assert len(assert_fits(shapes, t5(tmp_path), text_t5.RULES)) == 242


@pytest.mark.parametrize("rules", [text_clip.RULES, text_t5.RULES, text_t5.WAN_RULES, text_decoder.RULES])
def test_no_parameter_has_two_rules(rules):
    assert max(Counter(rule.path for rule in rules).values()) == 1
