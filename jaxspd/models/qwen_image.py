"""Qwen-Image's transformer: double-stream blocks over packed latents and Qwen2.5-VL's hidden states.

Source: Qwen-Image Technical Report (arXiv 2508.02324), section 2. Parameter names follow the
architecture; `convert/qwen_image.py` says which official key fills which.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspd.models.layers import (
    LayerNorm,
    Linear,
    Mlp,
    RMSNorm,
    layer,
    modulate,
    sinusoidal_embedding,
)
from jaxspd.models.mmdit import DoubleBlock, Modulation
from jaxspd.models.rotary import cut, grid_turns

ROPE_THETA = 10_000.0
TIME_CHANNELS = 256


@dataclass(frozen=True)
class QwenImageConfig:
    """The fields of `transformer/config.json`, with the official class's names and defaults."""

    patch_size: int = 2
    in_channels: int = 64
    out_channels: int | None = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class QwenImageTransformer(nnx.Module):
    """Velocity of packed latents.

    `dtype` is the dtype of weights and matrix products. Norms, softmax, rotary positions and the time
    embedding's sinusoids are always computed in float32.
    """

    def __init__(self, config: QwenImageConfig, *, dtype=jnp.float32):
        dim, heads, head_dim = config.dim, config.num_attention_heads, config.attention_head_dim
        self.config, self.dtype = config, dtype
        self.image_in = Linear(config.in_channels, dim, dtype=dtype)
        self.text_norm = RMSNorm(config.joint_attention_dim, dtype=dtype)
        self.text_in = Linear(config.joint_attention_dim, dim, dtype=dtype)
        self.time_in = Mlp(TIME_CHANNELS, dim, dim, jax.nn.silu, dtype=dtype)
        self.blocks = nnx.List(DoubleBlock(heads, head_dim, dtype=dtype) for _ in range(config.num_layers))
        self.modulation_out = Modulation(dim, 2, dtype=dtype)
        self.norm_out = LayerNorm(dim, dtype=dtype)
        out_channels = config.patch_size**2 * (config.out_channels or config.in_channels)
        self.out = Linear(dim, out_channels, dtype=dtype)

    def __call__(
        self,
        image: jax.Array,
        grid: tuple[int, int],
        text: jax.Array,
        text_lengths: jax.Array,
        sigma: jax.Array,
    ) -> jax.Array:
        """Velocity `[B, h*w, patch_size² * out_channels]` of tokens `image` `[B, h*w, in_channels]`, which
        lie on `grid` = (h, w), row by row.

        `text` is `[B, T, joint_attention_dim]`; all but the first `text_lengths` `[B]` tokens are padding.
        `sigma` is `[B]`.
        """
        positions = position_ids(grid, text.shape[1])
        turns = cut(grid_turns(positions, self.config.axes_dims_rope, ROPE_THETA), image.shape[1])
        # The official model embeds σ times 1000.
        vector = self.time_in(sinusoidal_embedding(1000 * sigma, TIME_CHANNELS).astype(self.dtype))
        text = self.text_in(self.text_norm(text.astype(self.dtype)))
        image = self.image_in(image.astype(self.dtype))
        lengths = image.shape[1] + text_lengths
        for block in self.blocks:
            image, text = layer(block, (image, text), vector, turns, lengths)
        scale, shift = self.modulation_out(vector)
        return self.out(modulate(self.norm_out(image), shift, scale))


def position_ids(grid: tuple[int, int], text_tokens: int) -> np.ndarray:
    """Positions (0, row, column) `[h*w + T, 3]`. The image is centred at 0. The text continues along the
    diagonal from the end of the image's larger side.
    """
    height, width = grid
    # If a side is odd, its larger half is negative.
    rows, columns = np.mgrid[height // 2 - height : height // 2, width // 2 - width : width // 2].reshape(
        2, -1
    )
    image = np.stack([np.zeros_like(rows), rows, columns], axis=-1)
    text = max(height // 2, width // 2) + np.arange(text_tokens)
    return np.concatenate([image, np.repeat(text[:, None], 3, axis=1)])
