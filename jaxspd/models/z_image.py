"""Z-Image's transformer: one stream of image and text tokens, after blocks that refine each separately.

Source: Z-Image: An Efficient Image Generation Foundation Model with Single-Stream Diffusion Transformer
(arXiv 2511.22699). Parameter names follow the architecture; `convert/z_image.py` says which official key
fills which.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from jaxspd.models.attention import attention
from jaxspd.models.layers import LayerNorm, Linear, Mlp, RMSNorm, layer, parameter, sinusoidal_embedding
from jaxspd.models.rotary import Turns, grid_turns, rotate_pairs

PATCH = 2
TIME_CHANNELS = 256
TIME_HIDDEN = 1024
# Channels of the time's vector, unless the model is narrower.
VECTOR_CHANNELS = 256
# Learned padding tokens fill up image and text to multiples of this.
MULTIPLE = 32
QK_EPSILON = 1e-5


@dataclass(frozen=True)
class ZImageConfig:
    """The fields of `transformer/config.json`, with the official class's names and defaults."""

    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    norm_eps: float = 1e-5
    qk_norm: bool = True
    cap_feat_dim: int = 2560
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)

    @property
    def mlp_dim(self) -> int:
        return int(self.dim / 3 * 8)

    @property
    def vector_dim(self) -> int:
        return min(self.dim, VECTOR_CHANNELS)


class GatedMlp(nnx.Module):
    """SwiGLU (arXiv 2002.05202), without biases."""

    def __init__(self, dim: int, hidden: int, *, dtype):
        self.gate = Linear(dim, hidden, dtype=dtype, use_bias=False)
        self.up = Linear(dim, hidden, dtype=dtype, use_bias=False)
        self.down = Linear(hidden, dim, dtype=dtype, use_bias=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention, then MLP, each between two norms. If `modulated`, the time's vector scales each one's input
    and gates its output.
    """

    def __init__(self, config: ZImageConfig, modulated: bool, *, dtype):
        dim, self.heads = config.dim, config.n_heads
        self.q, self.k, self.v, self.out = (Linear(dim, dim, dtype=dtype, use_bias=False) for _ in range(4))
        self.norm_q, self.norm_k = (
            RMSNorm(dim // self.heads, dtype=dtype, epsilon=QK_EPSILON) if config.qk_norm else None
            for _ in range(2)
        )
        self.norm_attention_in, self.norm_attention_out, self.norm_mlp_in, self.norm_mlp_out = (
            RMSNorm(dim, dtype=dtype, epsilon=config.norm_eps) for _ in range(4)
        )
        self.mlp = GatedMlp(dim, config.mlp_dim, dtype=dtype)
        self.modulation = Linear(config.vector_dim, 4 * dim, dtype=dtype) if modulated else None

    def __call__(self, x: jax.Array, vector: jax.Array, turns: Turns, lengths: jax.Array | None) -> jax.Array:
        """`x` `[B, N, D]` after this block. Queries see the first `lengths` `[B]` tokens; None means all.
        `vector` is `[B, vector_dim]`.
        """
        scale, gate, scale_mlp, gate_mlp = self._modulation(vector)
        attended = self._attend(self.norm_attention_in(x) * scale, turns, lengths)
        x = x + gate * self.norm_attention_out(attended)
        return x + gate_mlp * self.norm_mlp_out(self.mlp(self.norm_mlp_in(x) * scale_mlp))

    def _modulation(self, vector: jax.Array):
        if self.modulation is None:
            return 1, 1, 1, 1
        scale, gate, scale_mlp, gate_mlp = jnp.split(self.modulation(vector)[:, None], 4, axis=-1)
        return 1 + scale, jnp.tanh(gate), 1 + scale_mlp, jnp.tanh(gate_mlp)

    def _attend(self, x: jax.Array, turns: Turns, lengths: jax.Array | None) -> jax.Array:
        query, key, value = (
            rearrange(projection(x), "b n (h d) -> b n h d", h=self.heads)
            for projection in (self.q, self.k, self.v)
        )
        if self.norm_q is not None and self.norm_k is not None:
            query, key = self.norm_q(query), self.norm_k(key)
        return self.out(attention(rotate_pairs(query, turns), rotate_pairs(key, turns), value, lengths))


class ZImageTransformer(nnx.Module):
    """Velocity of latents from noise to picture: the negative of dx/dσ.

    `dtype` is the dtype of weights and matrix products. Norms, softmax, rotary positions and the time
    embedding's sinusoids are always computed in float32.
    """

    def __init__(self, config: ZImageConfig, *, dtype=jnp.float32):
        dim, channels = config.dim, PATCH**2 * config.in_channels
        self.config, self.dtype = config, dtype
        self.image_in = Linear(channels, dim, dtype=dtype)
        self.text_norm = RMSNorm(config.cap_feat_dim, dtype=dtype, epsilon=config.norm_eps)
        self.text_in = Linear(config.cap_feat_dim, dim, dtype=dtype)
        self.image_padding, self.text_padding = (parameter(1, dim, dtype=dtype) for _ in range(2))
        self.time_in = Mlp(TIME_CHANNELS, TIME_HIDDEN, config.vector_dim, jax.nn.silu, dtype=dtype)

        def blocks(length: int, modulated: bool):
            return nnx.List(Block(config, modulated, dtype=dtype) for _ in range(length))

        self.image_blocks = blocks(config.n_refiner_layers, modulated=True)
        self.text_blocks = blocks(config.n_refiner_layers, modulated=False)
        self.blocks = blocks(config.n_layers, modulated=True)
        self.norm_out = LayerNorm(dim, dtype=dtype)
        self.modulation_out = Linear(config.vector_dim, dim, dtype=dtype)
        self.out = Linear(dim, channels, dtype=dtype)

    def __call__(
        self, latents: jax.Array, text: jax.Array, text_lengths: jax.Array, time: jax.Array
    ) -> jax.Array:
        """Velocity `[B, C, H, W]` of `latents` `[B, C, H, W]`. `text` is `[B, T, cap_feat_dim]`; its first
        `text_lengths` `[B]` tokens are the prompt's. `time` is `[B]`, from 0 (noise) to 1 (clean).

        The learned padding token fills up each text to the next multiple of 32; no token sees the rest. T
        must be a multiple of 32, so that there is room for this padding; otherwise ValueError is raised.
        """
        if text.shape[1] % MULTIPLE:
            raise ValueError(f"text must be padded to a multiple of {MULTIPLE} tokens, not {text.shape[1]}")
        batch, height, width = len(latents), *(side // PATCH for side in latents.shape[-2:])
        time = sinusoidal_embedding(self.config.t_scale * time, TIME_CHANNELS)
        vector = self.time_in(time.astype(self.dtype))
        filled = padded(text_lengths)
        image_turns, text_turns = self._turns((height, width), text.shape[1], filled)

        patches = rearrange(latents, "b c (h p) (w q) -> b (h w) (p q c)", p=PATCH, q=PATCH)
        image = self.image_in(patches.astype(self.dtype))
        tokens = image.shape[1]
        padding = jnp.broadcast_to(self.image_padding[...], (batch, padded(tokens) - tokens, self.config.dim))
        image = jnp.concatenate([image, padding], axis=1)
        for block in self.image_blocks:
            image = layer(block, image, vector, image_turns, None)

        text = self.text_in(self.text_norm(text.astype(self.dtype)))
        given = jnp.arange(text.shape[1]) < text_lengths[:, None]
        text = jnp.where(given[:, :, None], text, self.text_padding[...])
        for block in self.text_blocks:
            text = layer(block, text, vector, text_turns, filled)

        # Text comes last, because masks can hide only the end of the sequence.
        turns = Turns(*(jnp.concatenate(pair, axis=1) for pair in zip(image_turns, text_turns, strict=True)))
        joined, lengths = jnp.concatenate([image, text], axis=1), image.shape[1] + filled
        for block in self.blocks:
            joined = layer(block, joined, vector, turns, lengths)

        scale = 1 + self.modulation_out(jax.nn.silu(vector))
        out = self.out(self.norm_out(joined[:, :tokens]) * scale[:, None])
        return rearrange(out, "b (h w) (p q c) -> b c (h p) (w q)", h=height, w=width, p=PATCH, q=PATCH)

    def _turns(self, grid: tuple[int, int], text_tokens: int, filled: jax.Array) -> tuple[Turns, Turns]:
        """Turns of image and text tokens. Text is at (1, 0, 0), (2, 0, 0), …. The image is at
        `(filled + 1, row, column)`, which depends on the prompt. The image's padding is at the origin.
        """
        axes, theta = self.config.axes_dims, self.config.rope_theta

        def table(positions: np.ndarray) -> Turns:
            return Turns(*(jnp.asarray(part[0]) for part in grid_turns(positions, axes, theta)))

        # Angles along the text's axis are looked up in a table, so that they are computed in float64 too.
        line = np.arange(text_tokens + 2)[:, None] * np.array([1, 0, 0])
        rows, columns = np.mgrid[: grid[0], : grid[1]].reshape(2, -1)
        on_grid = np.stack([np.zeros_like(rows), rows, columns], axis=-1)
        unseen = np.zeros((padded(len(on_grid)) - len(on_grid), 3), int)
        text, image = table(line), table(np.concatenate([on_grid, unseen]))
        real = (np.arange(image.cos.shape[0]) < len(on_grid))[:, None, None]
        first = axes[0] // 2

        def place(line: Any, image: Any) -> jax.Array:
            """`image` `[N, 1, d]` with its first axis at the position after the text; returns
            `[B, N, 1, d]`.
            """
            after = jnp.where(real, line[filled + 1, None, :, :first], image[:, :, :first])
            rest = jnp.broadcast_to(image[:, :, first:], (*after.shape[:3], image.shape[-1] - first))
            return jnp.concatenate([after, rest], axis=-1)

        lines = (jnp.broadcast_to(p[1:-1], (len(filled), *p[1:-1].shape)) for p in text)
        return Turns(*map(place, text, image)), Turns(*lines)


def padded(length):
    """`length`, an integer or an array of integers, rounded up to a multiple of 32."""
    return -(-length // MULTIPLE) * MULTIPLE
