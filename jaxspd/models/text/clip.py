"""CLIP's text model, from which FLUX.1 reads one vector per prompt.

Source: CLIP, arXiv 2103.00020. `convert/text_clip.py` says which official key fills which parameter.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspd.configs import checked_fields, wrong
from jaxspd.convert.checkpoint import read_config
from jaxspd.errors import UsageError
from jaxspd.models.attention import masked_attention
from jaxspd.models.layers import LayerNorm, Linear, layer
from jaxspd.models.text.layers import (
    Attention,
    Embedding,
    activate,
    causal,
    check_activation,
    visible,
)

# Old configurations give this end token, which is wrong: the true end token has the largest id.
WRONG_END = 2
# `model_type` of a text model alone, and of one with its vision tower.
KINDS = ("clip_text_model", "clip")


@dataclass(frozen=True)
class ClipTextConfig:
    """The options of the official `CLIPTextConfig` that change what the text model computes."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    @classmethod
    def from_folder(cls, folder: Path) -> "ClipTextConfig":
        """Reads the `config.json` of a text model or of a whole CLIP. Raises UsageError if it cannot be
        served.
        """
        given = read_config(folder)
        if given.get("model_type") not in KINDS:
            raise UsageError(f"{folder}/config.json is of {given.get('model_type')!r}, not of CLIP")
        text = given.get("text_config") or given
        if not isinstance(text, dict):
            raise wrong(folder / "config.json", "text_config", text, "an object")
        config = cls(**checked_fields(folder / "config.json", text, cls))
        check_activation(config.hidden_act, folder)
        if config.hidden_size % config.num_attention_heads:
            raise UsageError(
                f"{folder}/config.json: hidden_size {config.hidden_size} does not divide into "
                f"num_attention_heads {config.num_attention_heads}"
            )
        return config


# FLUX.1's.
CLIP_L = ClipTextConfig(
    hidden_size=768, intermediate_size=3072, num_attention_heads=12, eos_token_id=WRONG_END
)


class Block(nnx.Module):
    """Causal attention, then an MLP. Each reads normalised states, and its result is added to them."""

    def __init__(self, c: ClipTextConfig, *, dtype):
        dim, heads = c.hidden_size, c.num_attention_heads
        self.norm_attention = LayerNorm(dim, dtype=dtype, epsilon=c.layer_norm_eps, affine=True)
        self.attention = Attention(dim, heads, heads, dim // heads, dtype=dtype, qkv_bias=True, out_bias=True)
        self.norm_mlp = LayerNorm(dim, dtype=dtype, epsilon=c.layer_norm_eps, affine=True)
        self.linear_1 = Linear(dim, c.intermediate_size, dtype=dtype)
        self.linear_2 = Linear(c.intermediate_size, dim, dtype=dtype)
        self.activation = c.hidden_act

    def __call__(self, x: jax.Array, seen: jax.Array | np.ndarray) -> jax.Array:
        attended = masked_attention(*self.attention.project(self.norm_attention(x)), seen)
        x = x + self.attention.out(attended)
        return x + self.linear_2(activate(self.activation, self.linear_1(self.norm_mlp(x))))


class ClipTextModel(nnx.Module):
    """`model(ids, mask)`: the last hidden states and the pooled vector, both in `dtype`."""

    def __init__(self, config: ClipTextConfig, *, dtype):
        self.config, dim = config, config.hidden_size
        self.embedding = Embedding(config.vocab_size, dim, dtype=dtype)
        self.positions = Embedding(config.max_position_embeddings, dim, dtype=dtype)
        self.blocks = nnx.List(Block(config, dtype=dtype) for _ in range(config.num_hidden_layers))
        self.norm = LayerNorm(dim, dtype=dtype, epsilon=config.layer_norm_eps, affine=True)

    def __call__(self, ids: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Hidden states `[B, T, D]` and pooled vectors `[B, D]` of `ids` `[B, T]`. `mask` `[B, T]` is zero at
        padding. Raises UsageError if there are more tokens than positions.
        """
        states = self.encode(self.embedding(ids), mask)
        return states, self.pool(states, ids)

    def encode(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """The last hidden states of embedded tokens `[B, T, D]`."""
        tokens, longest = x.shape[1], self.config.max_position_embeddings
        if tokens > longest:
            raise UsageError(f"CLIP's text model reads {longest} tokens, not {tokens}; shorten the text")
        x = x + self.positions.embedding[...][:tokens]
        seen = visible(causal(tokens), mask)
        for block in self.blocks:
            x = layer(block, x, seen)
        return self.norm(x)

    def pool(self, states: jax.Array, ids: jax.Array) -> jax.Array:
        """Pooled vectors `[B, D]` from the last hidden states `[B, T, D]` of `ids` `[B, T]`."""
        return jnp.take_along_axis(states, self.end(ids)[:, None, None], axis=1)[:, 0]

    def end(self, ids: jax.Array) -> jax.Array:
        """Index `[B]` of the first end token of each text in `ids` `[B, T]`."""
        wanted = self.config.eos_token_id
        return jnp.argmax(ids if wanted == WRONG_END else ids == wanted, axis=-1)
