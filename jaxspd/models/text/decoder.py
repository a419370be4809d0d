"""Decoder-only language models whose hidden states pipelines read: Qwen3 (Z-Image, FLUX.2 [klein]), and the
text halves of Mistral 3 (FLUX.2 [dev]) and Qwen2.5-VL (Qwen-Image).

Source: Llama's architecture, arXiv 2302.13971, with grouped queries (arXiv 2305.13245); Qwen3, arXiv
2505.09388; Qwen2.5-VL, arXiv 2502.13923. `convert/text_decoder.py` says which official key fills which
parameter.
"""

from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from jaxspd.errors import UsageError
from jaxspd.models.attention import masked_attention
from jaxspd.models.layers import RMSNorm, layer
from jaxspd.models.rotary import Turns, rotate_halves, text_turns
from jaxspd.models.text.decoder_config import DecoderConfig
from jaxspd.models.text.layers import Attention, Embedding, GatedMlp, causal, visible


class Block(nnx.Module):
    """Causal attention, then a gated MLP. Each reads normalised states, and its result is added to them."""

    def __init__(self, c: DecoderConfig, *, dtype):
        def norm(dim: int) -> RMSNorm:
            return RMSNorm(dim, dtype=dtype, epsilon=c.rms_norm_eps)

        self.norm_attention = norm(c.hidden_size)
        self.attention = Attention(
            c.hidden_size,
            c.num_attention_heads,
            c.groups,
            c.channels,
            dtype=dtype,
            qkv_bias=c.qkv_bias,
            out_bias=c.out_bias,
        )
        self.norm_q = norm(c.channels) if c.qk_norm else None
        self.norm_k = norm(c.channels) if c.qk_norm else None
        self.norm_mlp = norm(c.hidden_size)
        self.mlp = GatedMlp(c.hidden_size, c.intermediate_size, c.hidden_act, dtype=dtype)

    def __call__(self, x: jax.Array, turns: Turns, seen: jax.Array | np.ndarray) -> jax.Array:
        """Hidden states `[B, T, D]` after this block. `x` is `[B, T, D]`, `turns` come from `text_turns`, and
        `seen` from `layers.visible`.
        """
        query, key, value = self.attention.project(self.norm_attention(x))
        if self.norm_q is not None and self.norm_k is not None:
            query, key = self.norm_q(query), self.norm_k(key)
        attended = masked_attention(rotate_halves(query, turns), rotate_halves(key, turns), value, seen)
        x = x + self.attention.out(attended)
        return x + self.mlp(self.norm_mlp(x))


class Decoder(nnx.Module):
    """`model(ids, mask)`: the hidden states with the numbers `states`, in `dtype`.

    State 0 is the embedded tokens; state n is the output of the n-th layer. The last layer's state is
    normalised too. Negative numbers count from the end. Only the layers that `states` need are made.
    """

    def __init__(self, config: DecoderConfig, states: Sequence[int] = (-1,), *, dtype):
        """Raises UsageError if the model has too few layers for `states`."""
        self.config, self.states = config, resolve(states, config.num_hidden_layers)
        self.embedding = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        depth = max(self.states)
        self.blocks = nnx.List(Block(config, dtype=dtype) for _ in range(depth))
        whole = depth == config.num_hidden_layers
        self.norm = last_norm(config, dtype=dtype) if whole else None

    def __call__(self, ids: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """Hidden states `[B, T, D]` of `ids` `[B, T]`, in the order of `states`. `mask` `[B, T]` is zero at
        padding, on either side; positions count padding too.
        """
        return self.encode(self.embedding(ids), mask)

    def encode(self, x: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """The same for embedded tokens `[B, T, D]`."""
        c, tokens = self.config, x.shape[1]
        turns = text_turns(tokens, c.channels, c.rope_theta)
        seen = visible(causal(tokens, c.sliding_window), mask)
        found = {0: x}
        for number, block in enumerate(self.blocks, 1):
            x = layer(block, x, turns, seen)
            if number in self.states:
                found[number] = x
        if self.norm is not None:
            found[c.num_hidden_layers] = self.norm(found[c.num_hidden_layers])
        return tuple(found[number] for number in self.states)


def last_norm(c: DecoderConfig, *, dtype) -> RMSNorm:
    """The norm after the model's last layer."""
    return RMSNorm(c.hidden_size, dtype=dtype, epsilon=c.rms_norm_eps)


def resolve(states: Sequence[int], layers: int) -> tuple[int, ...]:
    """The numbers `states` of hidden states, all counted from the beginning. Raises UsageError if a model of
    `layers` layers has too few.
    """
    counted = tuple(number + layers + 1 if number < 0 else number for number in states)
    wanted = ", ".join(map(str, states))
    if not all(0 <= number <= layers for number in counted):
        raise UsageError(
            f"the text encoder has {layers} layers, but hidden states {wanted} are read; "
            "it belongs to another pipeline"
        )
    return counted
