"""Configurations of decoder-only language models, as pipelines' folders hold them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxspd.configs import checked_fields, wrong
from jaxspd.convert.checkpoint import read_config
from jaxspd.errors import UsageError
from jaxspd.models.text.layers import check_activation


@dataclass(frozen=True)
class DecoderConfig:
    """The options of an official configuration that change the hidden states.

    `qkv_bias` and `out_bias` say whether the attention's projections have biases. `qk_norm` says whether
    queries and keys are normalised. A query sees at most `sliding_window` keys.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None
    head_dim: int | None
    rms_norm_eps: float
    rope_theta: float
    hidden_act: str = "silu"
    sliding_window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False

    @property
    def groups(self) -> int:
        """The number of heads of keys and values, which groups of queries' heads share."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def channels(self) -> int:
        """The channels of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_folder(cls, folder: Path) -> "DecoderConfig":
        """Reads `config.json`. Raises UsageError if it belongs to another kind of model or has an option that
        no published pipeline uses.
        """
        path = folder / "config.json"
        half, text = text_half(read_config(folder), path)
        kinds = text.get("layer_types") or []
        if (
            text.get("use_sliding_window")
            or not isinstance(kinds, list)
            or any(k != "full_attention" for k in kinds)
        ):
            raise UsageError(f"{path} wants sliding windows in some of the layers, which is not supported")
        options = checked_fields(path, text, cls)
        if half.startswith("qwen"):
            # Without `use_sliding_window` this number has no meaning.
            options["sliding_window"] = None
        if half == "qwen3":
            options["qkv_bias"] = options["out_bias"] = bool(text.get("attention_bias"))
        config = replace(DEFAULTS[half], **options)
        config = replace(
            config,
            rope_theta=theta(text, path) or config.rope_theta,
            head_dim=config.channels,
            num_key_value_heads=config.groups,
        )
        check_activation(config.hidden_act, folder)
        if config.num_attention_heads % config.groups or config.channels % 2:
            raise UsageError(
                f"{path}: {config.num_attention_heads} heads of {config.head_dim} channels cannot share "
                f"{config.num_key_value_heads} groups of keys; heads must divide by groups, and channels by 2"
            )
        return config


# `model_type` of the models that pipelines hold, and of their text halves.
TEXT_HALVES = {"qwen3": "qwen3", "qwen2_5_vl": "qwen2_5_vl_text", "mistral3": "mistral"}
# Defaults of the official classes. `mistral3` is for files without options of the text half.
DEFAULTS = {
    "qwen3": DecoderConfig(151936, 4096, 22016, 32, 32, 32, 128, 1e-6, 10_000.0, qk_norm=True),
    "qwen2_5_vl_text": DecoderConfig(152064, 8192, 29568, 80, 64, 8, None, 1e-5, 1e6, qkv_bias=True),
    "mistral": DecoderConfig(32000, 4096, 14336, 32, 32, 8, None, 1e-6, 10_000.0, sliding_window=4096),
    "mistral3": DecoderConfig(131072, 5120, 32768, 40, 32, 8, 128, 1e-5, 1e9),
}
# In order: the models of FLUX.2 [klein] 4B and Z-Image, of [klein] 9B, of Qwen-Image, and of FLUX.2 [dev].
QWEN3_4B = DecoderConfig(151936, 2560, 9728, 36, 32, 8, 128, 1e-6, 1e6, qk_norm=True)
QWEN3_8B = DecoderConfig(151936, 4096, 12288, 36, 32, 8, 128, 1e-6, 1e6, qk_norm=True)
QWEN2_5_VL_7B = DecoderConfig(152064, 3584, 18944, 28, 28, 4, 128, 1e-6, 1e6, qkv_bias=True)
MISTRAL_SMALL = DEFAULTS["mistral3"]


def text_half(given: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """The name of the text half of a pipeline's configuration, a key of `DEFAULTS`, and that half's options.

    Raises UsageError if the configuration belongs to another model.
    """
    kind, text = given.get("model_type"), given.get("text_config")
    if not isinstance(kind, str) or kind not in TEXT_HALVES:
        raise UsageError(f"{path} is of {kind!r}, not of {', '.join(TEXT_HALVES)}")
    half = TEXT_HALVES[kind]
    if text and not isinstance(text, dict):
        raise wrong(path, "text_config", text, "an object")
    if text and text.get("model_type", half) != half:
        raise UsageError(f"{path}: the text half is of {text['model_type']!r}, not of {half!r}")
    if kind == "mistral3" and not text:
        return kind, {}
    # Qwen3 has no other half. Older files of Qwen2.5-VL hold the options of both halves side by side.
    return half, text or given


def theta(text: dict[str, Any], path: Path) -> float | None:
    """The base of the rotary embedding, or None if `text` gives none. Raises UsageError if positions are
    scaled.
    """
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise wrong(path, "rope_parameters", rope, "an object")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    # Without pictures, all axes of Qwen2.5-VL's positions are equal.
    if kind not in ("default", "mrope"):
        raise UsageError(f"{path} wants rotary positions scaled by {kind!r}, which is not supported")
    base = rope.get("rope_theta") or text.get("rope_theta")
    if base is None:
        return None
    if type(base) not in (int, float) or not 1 < base < 1e30:
        raise wrong(path, "rope_theta", base, "a number above 1")
    return float(base)
