"""The encoders of T5, which FLUX.1 reads, and UMT5, which Wan reads.

Source: T5, arXiv 1910.10683; UMT5, arXiv 2304.09151. `convert/text_t5.py` says which official key fills which
parameter.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from jaxspd.configs import checked_fields
from jaxspd.convert.checkpoint import read_config
from jaxspd.errors import UsageError
from jaxspd.models.attention import masked_attention
from jaxspd.models.layers import Linear, RMSNorm, layer
from jaxspd.models.text.layers import (
    Attention,
    Embedding,
    GatedMlp,
    activate,
    check_activation,
    visible,
)


@dataclass(frozen=True)
class T5Config:
    """The options of the official `T5Config` and `UMT5Config` that change what the encoder computes. Defaults
    are T5's.

    `bias_per_layer` says whether each layer has its own position bias, as in UMT5, or all layers share one.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dense_act_fn: str = "relu"
    is_gated_act: bool = False
    bias_per_layer: bool = False

    @classmethod
    def from_folder(cls, folder: Path) -> "T5Config":
        """Reads `config.json`. Raises UsageError if it belongs to another kind of model or cannot be
        served.
        """
        given = read_config(folder)
        path, kind = folder / "config.json", given.get("model_type")
        if not isinstance(kind, str) or kind not in DEFAULTS:
            raise UsageError(f"{path} is of {kind!r}, not of {' or '.join(DEFAULTS)}")
        config = replace(DEFAULTS[kind], **checked_fields(path, feed_forward(given) | given, cls))
        check_activation(config.dense_act_fn, folder)
        return config


DEFAULTS = {
    "t5": T5Config(),
    "umt5": T5Config(
        vocab_size=250112,
        d_ff=1024,
        num_layers=8,
        num_heads=6,
        dense_act_fn="gelu_new",
        is_gated_act=True,
        bias_per_layer=True,
    ),
}
XXL: dict[str, Any] = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
# In order: FLUX.1's and Wan's.
T5_XXL = replace(DEFAULTS["t5"], **XXL, dense_act_fn="gelu_new", is_gated_act=True)
UMT5_XXL = replace(DEFAULTS["umt5"], **XXL, vocab_size=256384)


def feed_forward(given: dict) -> dict:
    """The options of the MLPs that `feed_forward_proj` stands for, for example "gated-gelu"."""
    if "feed_forward_proj" not in given:
        return {}
    *gated, name = str(given["feed_forward_proj"]).split("-")
    # In gated models "gelu" means the tanh formula.
    name = "gelu_new" if gated and name == "gelu" else name
    return {"is_gated_act": gated == ["gated"], "dense_act_fn": name}


def position_buckets(tokens: int, buckets: int, longest: int) -> np.ndarray:
    """The row of a position bias, below `buckets`, for each query (row) and key (column): `[T, T]`.

    The upper half of the rows is for keys after the query. In each half, the first rows are for single
    distances. The others are for ranges that grow with the distance; the last row is for `longest` and
    beyond. The ranges' limits come from rounding in float32, as in the official code.
    """
    distance = np.subtract.outer(np.arange(tokens), np.arange(tokens))
    half, far = buckets // 2, np.abs(distance)
    single = half // 2
    with np.errstate(divide="ignore"):
        ratio = np.log(far.astype(np.float32) / np.float32(single)) / np.float32(math.log(longest / single))
    ranges = single + np.maximum(ratio * np.float32(half - single), 0).astype(np.int32)
    return np.where(far < single, far, np.minimum(ranges, half - 1)) + np.where(distance < 0, half, 0)


class PositionBias(nnx.Module):
    """The numbers that are added to the scores of keys at each distance, for each head."""

    def __init__(self, c: T5Config, *, dtype):
        self.table = Embedding(c.relative_attention_num_buckets, c.num_heads, dtype=dtype)

    def __call__(self, buckets: jax.Array | np.ndarray) -> jax.Array:
        """The bias `[1, heads, T, T]` for `buckets` `[T, T]`."""
        return rearrange(self.table(jnp.asarray(buckets)), "q k h -> 1 h q k")


class Mlp(nnx.Module):
    """Two linear layers without biases, with an activation between them."""

    def __init__(self, c: T5Config, *, dtype):
        self.linear_1 = Linear(c.d_model, c.d_ff, dtype=dtype, use_bias=False)
        self.linear_2 = Linear(c.d_ff, c.d_model, dtype=dtype, use_bias=False)
        self.activation = c.dense_act_fn

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(activate(self.activation, self.linear_1(x)))


class Block(nnx.Module):
    """Attention, then an MLP. Each reads normalised states, and its result is added to them."""

    def __init__(self, c: T5Config, *, dtype):
        self.norm_attention = norm(c, dtype=dtype)
        self.attention = Attention(c.d_model, c.num_heads, c.num_heads, c.d_kv, dtype=dtype)
        self.bias = PositionBias(c, dtype=dtype) if c.bias_per_layer else None
        self.norm_mlp = norm(c, dtype=dtype)
        self.mlp: GatedMlp | Mlp = (
            GatedMlp(c.d_model, c.d_ff, c.dense_act_fn, dtype=dtype)
            if c.is_gated_act
            else Mlp(c, dtype=dtype)
        )

    def __call__(
        self, x: jax.Array, distances: jax.Array | np.ndarray, seen: jax.Array | np.ndarray | None
    ) -> jax.Array:
        """Hidden states `[B, T, D]` after this block, from `x` `[B, T, D]`. `distances` are the position bias
        that all blocks share, `[1, heads, T, T]`, or, if this block has its own bias, the buckets `[T, T]`.
        """
        bias = distances if self.bias is None else self.bias(distances)
        # The scores are not divided by √d_kv: the trained weights make up for it.
        attended = masked_attention(*self.attention.project(self.norm_attention(x)), seen, bias, scale=1.0)
        x = x + self.attention.out(attended)
        return x + self.mlp(self.norm_mlp(x))


class T5Encoder(nnx.Module):
    """`model(ids, mask)`: the last hidden states, in `dtype`."""

    def __init__(self, config: T5Config, *, dtype):
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model, dtype=dtype)
        self.bias = None if config.bias_per_layer else PositionBias(config, dtype=dtype)
        self.blocks = nnx.List(Block(config, dtype=dtype) for _ in range(config.num_layers))
        self.norm = norm(config, dtype=dtype)

    def __call__(self, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Hidden states `[B, T, D]` of `ids` `[B, T]`. `mask` `[B, T]` is zero at padding; without a mask,
        tokens see padding too.
        """
        return self.encode(self.embedding(ids), mask)

    def encode(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """The same for embedded tokens `[B, T, D]`."""
        c = self.config
        buckets = position_buckets(
            x.shape[1], c.relative_attention_num_buckets, c.relative_attention_max_distance
        )
        distances, seen = buckets if self.bias is None else self.bias(buckets), visible(None, mask)
        for block in self.blocks:
            x = layer(block, x, distances, seen)
        return self.norm(x)


def norm(c: T5Config, *, dtype) -> RMSNorm:
    """RMSNorm of the model's width."""
    return RMSNorm(c.d_model, dtype=dtype, epsilon=c.layer_norm_epsilon)
