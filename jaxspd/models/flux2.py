"""FLUX.2's transformer: double-stream blocks, then single-stream blocks, over patchified latents.

Source: Black Forest Labs, FLUX.2 (2025). In contrast to FLUX.1, all blocks share one modulation, MLPs are
gated, and no layer has a bias. Parameter names follow the architecture; `convert/flux2.py` says which
official key fills which parameter.
"""

from dataclasses import dataclass

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
    layer,
    modulate,
    sinusoidal_embedding,
)
from jaxspd.models.mmdit import JointBlock, Modulation
from jaxspd.models.rotary import Turns, cut, grid_turns, rotate_pairs


@dataclass(frozen=True)
class Flux2Config:
    """The fields of `transformer/config.json`, with the official class's names and defaults."""

    patch_size: int = 1
    in_channels: int = 128
    out_channels: int | None = None
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000
    eps: float = 1e-6
    guidance_embeds: bool = True

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_dim(self) -> int:
        return int(self.dim * self.mlp_ratio)


def gate(x: jax.Array) -> jax.Array:
    """The first half of the channels, after SiLU, times the second half (SwiGLU, arXiv 2002.05202)."""
    gates, values = jnp.split(x, 2, axis=-1)
    return jax.nn.silu(gates) * values


class GatedMlp(nnx.Module):
    """Two linear layers with a gate between them."""

    def __init__(self, config: Flux2Config, *, dtype):
        self.linear_1 = Linear(config.dim, 2 * config.mlp_dim, dtype=dtype, use_bias=False)
        self.linear_2 = Linear(config.mlp_dim, config.dim, dtype=dtype, use_bias=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(gate(self.linear_1(x)))


class SingleBlock(nnx.Module):
    """Attention and gated MLP in parallel over the joined sequence (arXiv 2302.05442). They share one input
    projection and one output projection.
    """

    def __init__(self, config: Flux2Config, *, dtype):
        dim, mlp_dim = config.dim, config.mlp_dim
        self.splits = (3 * dim,)
        self.heads = config.num_attention_heads
        self.norm = LayerNorm(dim, dtype=dtype, epsilon=config.eps)
        self.qkv_mlp = Linear(dim, 3 * dim + 2 * mlp_dim, dtype=dtype, use_bias=False)
        self.norm_q = RMSNorm(config.attention_head_dim, dtype=dtype, epsilon=config.eps)
        self.norm_k = RMSNorm(config.attention_head_dim, dtype=dtype, epsilon=config.eps)
        self.out = Linear(dim + mlp_dim, dim, dtype=dtype, use_bias=False)

    def __call__(self, x: jax.Array, vectors: list[jax.Array], turns: Turns) -> jax.Array:
        shift, scale, gate_out = vectors
        qkv, mlp = jnp.split(self.qkv_mlp(modulate(self.norm(x), shift, scale)), self.splits, axis=-1)
        query, key, value = rearrange(qkv, "b n (three h d) -> three b n h d", three=3, h=self.heads)
        query, key = rotate_pairs(self.norm_q(query), turns), rotate_pairs(self.norm_k(key), turns)
        branches = jnp.concatenate([attention(query, key, value), gate(mlp)], axis=-1)
        return x + gate_out[:, None] * self.out(branches)


class Flux2Transformer(nnx.Module):
    """Velocity of patchified latents as tokens.

    `dtype` is the dtype of weights and matrix products. Norms, softmax, rotary positions and the time
    embedding's sinusoids are always computed in float32.
    """

    def __init__(self, config: Flux2Config, *, dtype=jnp.float32):
        dim, heads, head_dim = config.dim, config.num_attention_heads, config.attention_head_dim
        self.config, self.dtype = config, dtype
        bare = {"dtype": dtype, "use_bias": False}

        def embedder() -> Mlp:
            return Mlp(config.timestep_guidance_channels, dim, dim, jax.nn.silu, **bare)

        self.image_in = Linear(config.in_channels, dim, **bare)
        self.text_in = Linear(config.joint_attention_dim, dim, **bare)
        self.time_in = embedder()
        self.guidance_in = embedder() if config.guidance_embeds else None
        self.image_modulation = Modulation(dim, 6, **bare)
        self.text_modulation = Modulation(dim, 6, **bare)
        self.single_modulation = Modulation(dim, 3, **bare)

        def double_block() -> JointBlock:
            return JointBlock(
                heads,
                head_dim,
                lambda: GatedMlp(config, dtype=dtype),
                dtype=dtype,
                use_bias=False,
                epsilon=config.eps,
            )

        self.double_blocks = nnx.List(double_block() for _ in range(config.num_layers))
        self.single_blocks = nnx.List(
            SingleBlock(config, dtype=dtype) for _ in range(config.num_single_layers)
        )
        self.modulation_out = Modulation(dim, 2, **bare)
        self.norm_out = LayerNorm(dim, dtype=dtype, epsilon=config.eps)
        out_channels = config.patch_size**2 * (config.out_channels or config.in_channels)
        self.out = Linear(dim, out_channels, **bare)

    def __call__(
        self,
        image: jax.Array,
        grid: tuple[int, int],
        text: jax.Array,
        sigma: jax.Array,
        guidance: jax.Array | None = None,
    ) -> jax.Array:
        """Velocity `[B, h*w, out_channels]` of tokens `image` `[B, h*w, in_channels]`, which lie on `grid` =
        (h, w), row by row.

        The other inputs are `text` `[B, T, joint_attention_dim]`, `sigma` `[B]` and `guidance` `[B]`.
        Guidance is given only if the checkpoint embeds it.
        """
        config = self.config
        turns = grid_turns(position_ids(grid, text.shape[1]), config.axes_dims_rope, config.rope_theta)

        def embed_scalar(embedder: Mlp, scalar: jax.Array) -> jax.Array:
            # The official model embeds σ and guidance times 1000.
            embedded = sinusoidal_embedding(1000 * scalar, config.timestep_guidance_channels)
            return embedder(embedded.astype(self.dtype))

        vector = embed_scalar(self.time_in, sigma)
        if self.guidance_in is not None:
            assert guidance is not None, "this checkpoint embeds a guidance scale"
            vector = vector + embed_scalar(self.guidance_in, guidance)
        modulations = self.image_modulation(vector), self.text_modulation(vector)

        image = self.image_in(image.astype(self.dtype))
        text = self.text_in(text.astype(self.dtype))
        of_streams = cut(turns, image.shape[1])
        for block in self.double_blocks:
            image, text = layer(block, (image, text), *modulations, of_streams)
        joined = jnp.concatenate([image, text], axis=1)
        modulation = self.single_modulation(vector)
        for single in self.single_blocks:
            joined = layer(single, joined, modulation, turns)
        image = joined[:, : image.shape[1]]
        scale, shift = self.modulation_out(vector)
        return self.out(modulate(self.norm_out(image), shift, scale))


def position_ids(grid: tuple[int, int], text_tokens: int) -> np.ndarray:
    """Positions (time, row, column, index in the text) `[h*w + T, 4]`. Image tokens lie on the grid; text
    tokens are counted on the last axis.
    """
    image, text = np.zeros((grid[0] * grid[1], 4), int), np.zeros((text_tokens, 4), int)
    image[:, 1:3] = np.moveaxis(np.mgrid[: grid[0], : grid[1]], 0, -1).reshape(-1, 2)
    text[:, 3] = np.arange(text_tokens)
    return np.concatenate([image, text])
