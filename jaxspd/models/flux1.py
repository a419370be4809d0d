"""FLUX.1's transformer: double-stream blocks, then single-stream blocks, over packed latents.

Source: Black Forest Labs, FLUX.1 (2024); rectified-flow transformers, arXiv 2403.03206. Parameter
names follow the architecture; `convert/flux1.py` says which official key fills which.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspd.models.attention import attention
from jaxspd.models.layers import (
    LayerNorm,
    Linear,
    Mlp,
    gelu_tanh,
    layer,
    modulate,
    sinusoidal_embedding,
)
from jaxspd.models.mmdit import MLP_RATIO, DoubleBlock, Modulation, SelfAttentionInputs
from jaxspd.models.rotary import Turns, cut, grid_turns, rotate_pairs

ROPE_THETA = 10_000.0
TIME_CHANNELS = 256


@dataclass(frozen=True)
class Flux1Config:
    """The fields of `transformer/config.json`, with the official class's names and defaults."""

    patch_size: int = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class SingleBlock(nnx.Module):
    """Attention and MLP in parallel over the joined sequence (arXiv 2302.05442)."""

    def __init__(self, config: Flux1Config, *, dtype):
        dim, heads, head_dim = config.dim, config.num_attention_heads, config.attention_head_dim
        self.modulation = Modulation(dim, 3, dtype=dtype)
        self.norm = LayerNorm(dim, dtype=dtype)
        self.qkv = SelfAttentionInputs(heads, head_dim, dtype=dtype)
        self.mlp = Linear(dim, MLP_RATIO * dim, dtype=dtype)
        self.out = Linear((1 + MLP_RATIO) * dim, dim, dtype=dtype)

    def __call__(self, x: jax.Array, vector: jax.Array, turns: Turns) -> jax.Array:
        shift, scale, gate = self.modulation(vector)
        hidden = modulate(self.norm(x), shift, scale)
        query, key, value = self.qkv(hidden)
        attended = attention(rotate_pairs(query, turns), rotate_pairs(key, turns), value)
        branches = jnp.concatenate([attended, gelu_tanh(self.mlp(hidden))], axis=-1)
        return x + gate[:, None] * self.out(branches)


class Flux1Transformer(nnx.Module):
    """Velocity of packed latents.

    `dtype` is the dtype of weights and matrix products. Norms, softmax, rotary positions and the time
    embedding's sinusoids are always computed in float32.
    """

    def __init__(self, config: Flux1Config, *, dtype=jnp.float32):
        dim, heads, head_dim = config.dim, config.num_attention_heads, config.attention_head_dim
        self.config = config
        self.dtype = dtype
        self.image_in = Linear(config.in_channels, dim, dtype=dtype)
        self.text_in = Linear(config.joint_attention_dim, dim, dtype=dtype)

        def embedder(dim_in: int) -> Mlp:
            return Mlp(dim_in, dim, dim, jax.nn.silu, dtype=dtype)

        self.time_in = embedder(TIME_CHANNELS)
        self.guidance_in = embedder(TIME_CHANNELS) if config.guidance_embeds else None
        self.pooled_in = embedder(config.pooled_projection_dim)
        self.double_blocks = nnx.List(
            DoubleBlock(heads, head_dim, dtype=dtype) for _ in range(config.num_layers)
        )
        self.single_blocks = nnx.List(
            SingleBlock(config, dtype=dtype) for _ in range(config.num_single_layers)
        )
        self.modulation_out = Modulation(dim, 2, dtype=dtype)
        self.norm_out = LayerNorm(dim, dtype=dtype)
        out_channels = config.patch_size**2 * (config.out_channels or config.in_channels)
        self.out = Linear(dim, out_channels, dtype=dtype)

    def __call__(
        self,
        image: jax.Array,
        grid: tuple[int, int],
        text: jax.Array,
        pooled: jax.Array,
        sigma: jax.Array,
        guidance: jax.Array | None = None,
    ) -> jax.Array:
        """Velocity `[B, h*w, out_channels]` of tokens `image` `[B, h*w, in_channels]`, which lie on `grid` =
        (h, w), row by row.

        The other inputs are `text` `[B, T, joint_attention_dim]`, `pooled` `[B, pooled_projection_dim]`,
        `sigma` `[B]` and `guidance` `[B]`. Guidance is given only if the checkpoint embeds it.
        """
        turns = grid_turns(position_ids(grid, text.shape[1]), self.config.axes_dims_rope, ROPE_THETA)

        def embed_scalar(embedder: Mlp, scalar: jax.Array) -> jax.Array:
            # The official model embeds σ and guidance times 1000.
            return embedder(sinusoidal_embedding(1000 * scalar, TIME_CHANNELS).astype(self.dtype))

        vector = embed_scalar(self.time_in, sigma) + self.pooled_in(pooled.astype(self.dtype))
        if self.guidance_in is not None:
            assert guidance is not None, "this checkpoint embeds a guidance scale"
            vector = vector + embed_scalar(self.guidance_in, guidance)

        image = self.image_in(image.astype(self.dtype))
        text = self.text_in(text.astype(self.dtype))
        of_streams = cut(turns, image.shape[1])
        for block in self.double_blocks:
            image, text = layer(block, (image, text), vector, of_streams)
        joined = jnp.concatenate([image, text], axis=1)
        for single in self.single_blocks:
            joined = layer(single, joined, vector, turns)
        image = joined[:, : image.shape[1]]
        scale, shift = self.modulation_out(vector)
        return self.out(modulate(self.norm_out(image), shift, scale))


def position_ids(grid: tuple[int, int], text_tokens: int) -> np.ndarray:
    """Positions (0, row, column) `[h*w + T, 3]`: image tokens sit on the grid, text at the origin."""
    rows, columns = np.mgrid[: grid[0], : grid[1]].reshape(2, -1)
    image = np.stack([np.zeros_like(rows), rows, columns], axis=-1)
    return np.concatenate([image, np.zeros((text_tokens, 3), int)])
