"""Conversion between spatial latents and the patches and tokens that transformers read."""

import jax
from einops import rearrange


def pack(latents: jax.Array) -> jax.Array:
    """`[B, C, 2h, 2w]` to `[B, h*w, 4C]`: each token is a 2×2 patch, channels outermost within it."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack(tokens: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """`[B, h*w, 4C]` on `grid` = (h, w) back to `[B, C, 2h, 2w]`."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=grid[0], p=2, q=2)


def patchify(latents: jax.Array) -> jax.Array:
    """`[B, C, 2h, 2w]` to `[B, 4C, h, w]`: each 2×2 patch becomes channels, the old channels outermost."""
    return rearrange(latents, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)


def unpatchify(latents: jax.Array) -> jax.Array:
    """`[B, 4C, h, w]` back to `[B, C, 2h, 2w]`."""
    return rearrange(latents, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)
