"""Wan 2.1's text-to-video transformer: self-attention over space and time, cross-attention to text.

Source: Wan: Open and Advanced Large-Scale Video Generative Models (arXiv 2503.20314), section 4.2.
Parameter names follow the architecture; `convert/wan.py` says which official key fills which.
"""

from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from jaxspd.models.attention import attention
from jaxspd.models.layers import (
    LayerNorm,
    Linear,
    Mlp,
    RMSNorm,
    gelu_tanh,
    layer,
    modulate,
    parameter,
    sinusoidal_embedding,
)
from jaxspd.models.rotary import Turns, grid_turns, rotate_pairs

ROPE_THETA = 10_000.0


@dataclass(frozen=True)
class WanConfig:
    """The fields of `transformer/config.json`, with the official class's names and defaults."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int | None = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    eps: float = 1e-6

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """Channels of a head that are rotated by time, row and column."""
        side = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * side, side, side


class Attention(nnx.Module):
    """Multi-head attention; queries and keys are normalised across all heads together."""

    def __init__(self, config: WanConfig, *, dtype):
        self.q, self.k, self.v, self.out = (Linear(config.dim, config.dim, dtype=dtype) for _ in range(4))
        self.norm_q = RMSNorm(config.dim, dtype=dtype, epsilon=config.eps)
        self.norm_k = RMSNorm(config.dim, dtype=dtype, epsilon=config.eps)
        self.heads = config.num_attention_heads

    def __call__(self, x: jax.Array, context: jax.Array, turns: Turns | None = None) -> jax.Array:
        """`x` `[B, N, D]` attends to `context` `[B, M, D]`; returns `[B, N, D]`. If `turns` are given, they
        rotate queries and keys.
        """
        query, key, value = (
            rearrange(part, "b n (h d) -> b n h d", h=self.heads)
            for part in (self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context))
        )
        if turns is not None:
            query, key = rotate_pairs(query, turns), rotate_pairs(key, turns)
        return self.out(attention(query, key, value))


class Block(nnx.Module):
    """Self-attention, cross-attention to the text, then an MLP. Norms, modulation and gated sums are in
    float32.
    """

    def __init__(self, config: WanConfig, *, dtype):
        dim, self.dtype = config.dim, dtype
        self.modulation = Table(6, dim)
        self.norm = LayerNorm(dim, dtype=jnp.float32, epsilon=config.eps)
        self.self_attention = Attention(config, dtype=dtype)
        self.cross_norm = (
            LayerNorm(dim, dtype=jnp.float32, epsilon=config.eps, affine=True)
            if config.cross_attn_norm
            else None
        )
        self.cross_attention = Attention(config, dtype=dtype)
        self.mlp = Mlp(dim, config.ffn_dim, dim, gelu_tanh, dtype=dtype)

    def __call__(self, x: jax.Array, text: jax.Array, time: jax.Array, turns: Turns) -> jax.Array:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(time)
        hidden = modulate(self.norm(x), shift, scale).astype(self.dtype)
        attended = self.self_attention(hidden, hidden, turns)
        x = (x + gate[:, None] * attended).astype(self.dtype)
        hidden = x if self.cross_norm is None else self.cross_norm(x).astype(self.dtype)
        x = x + self.cross_attention(hidden, text)
        hidden = modulate(self.norm(x), shift_mlp, scale_mlp).astype(self.dtype)
        return (x + gate_mlp[:, None] * self.mlp(hidden)).astype(self.dtype)


class Table(nnx.Module):
    """`count` learned vectors, each added to the time's vector: `[B, D]` each, float32."""

    def __init__(self, count: int, dim: int):
        # These are float32 whatever the model's dtype is, as in the official model.
        self.vectors = parameter(1, count, dim, dtype=jnp.float32)

    def __call__(self, time: jax.Array) -> tuple[jax.Array, ...]:
        """`time` is `[B, count, D]`, or `[B, 1, D]` if all vectors are the same."""
        return jnp.unstack(self.vectors[...] + time.astype(jnp.float32), axis=1)


class WanTransformer(nnx.Module):
    """Velocity of video latents.

    `dtype` is the dtype of weights and matrix products. Norms, softmax, rotary positions, modulation and the
    time embedding are always computed in float32. The weights of modulation and time embedding are float32
    too.
    """

    def __init__(self, config: WanConfig, *, dtype=jnp.float32):
        dim = config.dim
        self.config, self.dtype = config, dtype
        self.patch_in = Linear((config.in_channels, *config.patch_size), dim, dtype=dtype)
        self.time_in = Mlp(config.freq_dim, dim, dim, jax.nn.silu, dtype=jnp.float32)
        self.time_out = Linear(dim, 6 * dim, dtype=dtype)
        self.text_in = Mlp(config.text_dim, dim, dim, gelu_tanh, dtype=dtype)
        self.blocks = nnx.List(Block(config, dtype=dtype) for _ in range(config.num_layers))
        self.modulation_out = Table(2, dim)
        self.norm_out = LayerNorm(dim, dtype=jnp.float32, epsilon=config.eps)
        out_channels = config.out_channels or config.in_channels
        self.out = Linear(dim, out_channels * prod(config.patch_size), dtype=dtype)

    def __call__(self, latents: jax.Array, text: jax.Array, time: jax.Array) -> jax.Array:
        """Velocity `[B, out_channels, T, H, W]` of `latents` `[B, C, T, H, W]`. `text` is `[B, S, text_dim]`,
        zero at padding; `time` is `[B]`, from 0 (clean) to 1000 (noise).
        """
        pt, ph, pw = self.config.patch_size
        frames, height, width = (n // p for n, p in zip(latents.shape[2:], (pt, ph, pw), strict=True))
        positions = np.moveaxis(np.mgrid[:frames, :height, :width], 0, -1).reshape(-1, 3)
        turns = grid_turns(positions, self.config.rope_axes, ROPE_THETA)

        # As in the official model, the time's vector is computed in float32, then rounded to the model's
        # dtype.
        vector = self.time_in(sinusoidal_embedding(time, self.config.freq_dim)).astype(self.dtype)
        modulation = rearrange(self.time_out(jax.nn.silu(vector)), "b (six d) -> b six d", six=6)

        patches = rearrange(latents, "b c (t p) (h q) (w r) -> b (t h w) c p q r", p=pt, q=ph, r=pw)
        x = self.patch_in(patches.astype(self.dtype))
        text = self.text_in(text.astype(self.dtype))
        for block in self.blocks:
            x = layer(block, x, text, modulation, turns)

        shift, scale = self.modulation_out(vector[:, None])
        x = self.out(modulate(self.norm_out(x), shift, scale).astype(self.dtype))
        return rearrange(
            x,
            "b (t h w) (p q r c) -> b c (t p) (h q) (w r)",
            t=frames,
            h=height,
            p=pt,
            q=ph,
            r=pw,
        )
