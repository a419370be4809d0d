"""FLUX.1's transformer: double-stream blocks, then single-stream blocks, over packed latents.

Source: Black Forest Labs, FLUX.1 (2024); rectified-flow transformers, arXiv 2403.03206. Parameter
names follow the architecture; `convert/flux1.py` says which official key fills which.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from jaxspd.models.layers import (
    Mlp,
    apply_rope,
    attention,
    gelu_tanh,
    layer_norm,
    linear,
    modulate,
    rms_norm,
    rope_table,
    scan,
    sinusoidal_embedding,
    stack,
)

ROPE_THETA = 10_000.0
TIME_CHANNELS = 256
MLP_RATIO = 4


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


class SelfAttentionInputs(nnx.Module):
    """Queries, keys and values `[B, N, heads, head_dim]` of one stream, queries and keys normalised."""

    def __init__(self, config: Flux1Config, *, dtype, rngs):
        for name in ("q", "k", "v"):
            setattr(self, name, linear(config.dim, config.dim, dtype=dtype, rngs=rngs))
        self.norm_q = rms_norm(config.attention_head_dim, dtype=dtype, rngs=rngs)
        self.norm_k = rms_norm(config.attention_head_dim, dtype=dtype, rngs=rngs)
        self.heads = config.num_attention_heads

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        query, key, value = (
            rearrange(project(x), "b n (h d) -> b n h d", h=self.heads)
            for project in (self.q, self.k, self.v)
        )
        return self.norm_q(query), self.norm_k(key), value


class Modulation(nnx.Module):
    """`count` vectors `[B, D]` computed from the conditioning vector."""

    def __init__(self, dim: int, count: int, *, dtype, rngs):
        self.linear = linear(dim, count * dim, dtype=dtype, rngs=rngs)
        self.count = count

    def __call__(self, vector: jax.Array) -> list[jax.Array]:
        return jnp.split(self.linear(jax.nn.silu(vector)), self.count, axis=-1)


class Stream(nnx.Module):
    """One modality's half of a double-stream block: everything but the joint attention."""

    def __init__(self, config: Flux1Config, *, dtype, rngs):
        dim = config.dim
        self.modulation = Modulation(dim, 6, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.qkv = SelfAttentionInputs(config, dtype=dtype, rngs=rngs)
        self.out = linear(dim, dim, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(dim, MLP_RATIO * dim, dim, gelu_tanh, dtype=dtype, rngs=rngs)

    def attend(self, x: jax.Array, shift: jax.Array, scale: jax.Array):
        return self.qkv(modulate(self.norm(x), shift, scale))

    def finish(self, x, attended, gate, shift_mlp, scale_mlp, gate_mlp):
        x = x + gate[:, None] * self.out(attended)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm(x), shift_mlp, scale_mlp))


class DoubleBlock(nnx.Module):
    """Text and image keep weights of their own and meet in one attention (MMDiT, arXiv 2403.03206)."""

    def __init__(self, config: Flux1Config, *, dtype, rngs):
        self.image = Stream(config, dtype=dtype, rngs=rngs)
        self.text = Stream(config, dtype=dtype, rngs=rngs)

    def __call__(self, carry, vector: jax.Array, angles: np.ndarray):
        image, text = carry
        image_shift, image_scale, *image_rest = self.image.modulation(vector)
        text_shift, text_scale, *text_rest = self.text.modulation(vector)
        query, key, value = (
            jnp.concatenate(pair, axis=1)
            for pair in zip(
                self.text.attend(text, text_shift, text_scale),
                self.image.attend(image, image_shift, image_scale),
                strict=True,
            )
        )
        attended = attention(apply_rope(query, angles), apply_rope(key, angles), value)
        attended_text, attended_image = jnp.split(attended, [text.shape[1]], axis=1)
        image = self.image.finish(image, attended_image, *image_rest)
        text = self.text.finish(text, attended_text, *text_rest)
        return image, text


class SingleBlock(nnx.Module):
    """Attention and MLP side by side over the joined sequence (arXiv 2302.05442)."""

    def __init__(self, config: Flux1Config, *, dtype, rngs):
        dim = config.dim
        self.modulation = Modulation(dim, 3, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(dim, dtype=dtype, rngs=rngs)
        self.qkv = SelfAttentionInputs(config, dtype=dtype, rngs=rngs)
        self.mlp = linear(dim, MLP_RATIO * dim, dtype=dtype, rngs=rngs)
        self.out = linear((1 + MLP_RATIO) * dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, vector: jax.Array, angles: np.ndarray) -> jax.Array:
        shift, scale, gate = self.modulation(vector)
        hidden = modulate(self.norm(x), shift, scale)
        query, key, value = self.qkv(hidden)
        attended = attention(apply_rope(query, angles), apply_rope(key, angles), value)
        branches = jnp.concatenate([attended, gelu_tanh(self.mlp(hidden))], axis=-1)
        return x + gate[:, None] * self.out(branches)


class Flux1Transformer(nnx.Module):
    """Velocity of packed latents.

    `dtype` is that of the weights and matrix products; norms, softmax, rotary positions and the time
    embedding's sinusoids are computed in float32 whatever it is.
    """

    def __init__(self, config: Flux1Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
        dim = config.dim
        self.config = config
        self.dtype = dtype
        self.image_in = linear(config.in_channels, dim, dtype=dtype, rngs=rngs)
        self.text_in = linear(config.joint_attention_dim, dim, dtype=dtype, rngs=rngs)

        def embedder(dim_in: int) -> Mlp:
            return Mlp(dim_in, dim, dim, jax.nn.silu, dtype=dtype, rngs=rngs)

        self.time_in = embedder(TIME_CHANNELS)
        self.guidance_in = embedder(TIME_CHANNELS) if config.guidance_embeds else None
        self.pooled_in = embedder(config.pooled_projection_dim)
        self.double_blocks = stack(
            lambda r: DoubleBlock(config, dtype=dtype, rngs=r), config.num_layers, rngs
        )
        self.single_blocks = stack(
            lambda r: SingleBlock(config, dtype=dtype, rngs=r), config.num_single_layers, rngs
        )
        self.modulation_out = Modulation(dim, 2, dtype=dtype, rngs=rngs)
        self.norm_out = layer_norm(dim, dtype=dtype, rngs=rngs)
        out_channels = config.patch_size**2 * (config.out_channels or config.in_channels)
        self.out = linear(dim, out_channels, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        image: jax.Array,
        grid: tuple[int, int],
        text: jax.Array,
        pooled: jax.Array,
        sigma: jax.Array,
        guidance: jax.Array | None = None,
    ) -> jax.Array:
        """`image` `[B, h*w, in_channels]` with `grid` = (h, w) tokens, row by row; `text`
        `[B, T, joint_attention_dim]`; `pooled` `[B, pooled_projection_dim]`; `sigma` and `guidance`
        `[B]`, guidance only where the checkpoint embeds it. Returns `[B, h*w, out_channels]`.
        """
        angles = rope_table(position_ids(text.shape[1], grid), self.config.axes_dims_rope, ROPE_THETA)

        def embed_scalar(embedder: Mlp, scalar: jax.Array) -> jax.Array:
            # The official model feeds thousandths: σ and guidance both times 1000.
            return embedder(sinusoidal_embedding(1000 * scalar, TIME_CHANNELS).astype(self.dtype))

        vector = embed_scalar(self.time_in, sigma) + self.pooled_in(pooled.astype(self.dtype))
        if self.guidance_in is not None:
            vector = vector + embed_scalar(self.guidance_in, guidance)

        image = self.image_in(image.astype(self.dtype))
        text = self.text_in(text.astype(self.dtype))
        image, text = scan(self.double_blocks, (image, text), vector, angles)
        joined = jnp.concatenate([text, image], axis=1)
        joined = scan(self.single_blocks, joined, vector, angles)
        image = joined[:, text.shape[1] :]
        scale, shift = self.modulation_out(vector)
        return self.out(modulate(self.norm_out(image), shift, scale))


def position_ids(text_tokens: int, grid: tuple[int, int]) -> np.ndarray:
    """Positions (0, row, column) `[T + h*w, 3]`: text sits at the origin, image tokens on the grid."""
    rows, columns = np.mgrid[: grid[0], : grid[1]].reshape(2, -1)
    image = np.stack([np.zeros_like(rows), rows, columns], axis=-1)
    return np.concatenate([np.zeros((text_tokens, 3), int), image])
