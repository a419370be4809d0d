"""Text encoders of official size, without their weights: every key, every shape."""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax.numpy as jnp
import pytest
import torch
import transformers
from flax import nnx
from jaxspd.convert import text_clip, text_decoder, text_t5
from jaxspd.convert.loader import assign, flat_parameters

from jaxspd.models.text.clip import ClipTextConfig, ClipTextModel
from jaxspd.models.text.decoder import Decoder
from jaxspd.models.text.decoder_config import DecoderConfig
from jaxspd.models.text.t5 import DEFAULTS, T5Config, T5Encoder
from tests.test_text_configs import written

CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "eos_token_id": 2,
}
XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
QWEN3_8B = QWEN3_4B | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
QWEN2_5_VL = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
    },
    "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584},
}
