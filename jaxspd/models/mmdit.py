"""Two streams, image and text, which have their own weights and share one attention.

Source: MMDiT, arXiv 2403.03206. FLUX.1, FLUX.2 and Qwen-Image are built of these blocks.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from jaxspd.models.attention import joint_attention
from jaxspd.models.layers import LayerNorm, Linear, Mlp, RMSNorm, gelu_tanh, modulate
from jaxspd.models.rotary import Turns, rotate_pairs

MLP_RATIO = 4


class SelfAttentionInputs(nnx.Module):
    """Queries, keys and values `[B, N, heads, head_dim]` of one stream. Queries and keys are normalised."""

    def __init__(self, heads: int, head_dim: int, *, dtype, use_bias=True, epsilon=1e-6):
        dim = heads * head_dim
        self.q, self.k, self.v = (Linear(dim, dim, dtype=dtype, use_bias=use_bias) for _ in range(3))
        self.norm_q = RMSNorm(head_dim, dtype=dtype, epsilon=epsilon)
        self.norm_k = RMSNorm(head_dim, dtype=dtype, epsilon=epsilon)
        self.heads = heads

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        query, key, value = (
            rearrange(project(x), "b n (h d) -> b n h d", h=self.heads)
            for project in (self.q, self.k, self.v)
        )
        return self.norm_q(query), self.norm_k(key), value


class Modulation(nnx.Module):
    """`count` vectors `[B, D]` computed from the conditioning vector."""

    def __init__(self, dim: int, count: int, *, dtype, use_bias=True):
        self.linear = Linear(dim, count * dim, dtype=dtype, use_bias=use_bias)
        self.count = count

    def __call__(self, vector: jax.Array) -> list[jax.Array]:
        return jnp.split(self.linear(jax.nn.silu(vector)), self.count, axis=-1)


class Stream(nnx.Module):
    """One modality's half of a block: everything but the joint attention."""

    def __init__(self, heads: int, head_dim: int, mlp: nnx.Module, *, dtype, use_bias, epsilon):
        dim = heads * head_dim
        self.norm = LayerNorm(dim, dtype=dtype, epsilon=epsilon)
        self.qkv = SelfAttentionInputs(heads, head_dim, dtype=dtype, use_bias=use_bias, epsilon=epsilon)
        self.out = Linear(dim, dim, dtype=dtype, use_bias=use_bias)
        self.mlp = mlp

    def attend(self, x: jax.Array, shift: jax.Array, scale: jax.Array):
        return self.qkv(modulate(self.norm(x), shift, scale))

    def finish(self, x, attended, gate, shift_mlp, scale_mlp, gate_mlp):
        x = x + gate[:, None] * self.out(attended)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm(x), shift_mlp, scale_mlp))


class JointBlock(nnx.Module):
    """One block of both streams; its modulation vectors are arguments.

    The joint sequence holds the image first, then the text, which may end in padding. `make_mlp()` makes each
    stream's MLP.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        make_mlp: Callable[[], nnx.Module],
        *,
        dtype,
        use_bias=True,
        epsilon=1e-6,
    ):
        self.image, self.text = (
            Stream(heads, head_dim, make_mlp(), dtype=dtype, use_bias=use_bias, epsilon=epsilon)
            for _ in range(2)
        )

    def __call__(
        self,
        carry: tuple[jax.Array, jax.Array],
        image_vectors: Sequence[jax.Array],
        text_vectors: Sequence[jax.Array],
        turns: tuple[Turns, Turns],
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the new `carry`, which is (image `[B, N, D]`, text `[B, T, D]`).

        Each stream's vectors `[B, D]` are shift, scale and gate of the attention, then of the MLP. `turns`
        are the image's and the text's. `lengths` `[B]` counts the tokens of both streams without padding.
        """
        image, text = carry
        streams = (
            self.image.attend(image, *image_vectors[:2]),
            self.text.attend(text, *text_vectors[:2]),
        )
        unturned_queries, unturned_keys, values = zip(*streams, strict=True)
        queries, keys = ([*map(rotate_pairs, some, turns)] for some in (unturned_queries, unturned_keys))
        attended_image, attended_text = joint_attention(queries, keys, values, lengths)
        image = self.image.finish(image, attended_image, *image_vectors[2:])
        text = self.text.finish(text, attended_text, *text_vectors[2:])
        return image, text


class DoubleBlock(JointBlock):
    """A block that computes its own modulation, as in FLUX.1 and Qwen-Image."""

    def __init__(self, heads: int, head_dim: int, *, dtype):
        dim = heads * head_dim

        def make_mlp() -> Mlp:
            return Mlp(dim, MLP_RATIO * dim, dim, gelu_tanh, dtype=dtype)

        super().__init__(heads, head_dim, make_mlp, dtype=dtype)
        self.image_modulation = Modulation(dim, 6, dtype=dtype)
        self.text_modulation = Modulation(dim, 6, dtype=dtype)

    # It is given one vector, of which it makes the others.
    def __call__(  # type: ignore[override]
        self, carry, vector: jax.Array, turns: tuple[Turns, Turns], lengths=None
    ):
        """Like `JointBlock`, with modulation from the conditioning vector `[B, D]`."""
        return super().__call__(
            carry, self.image_modulation(vector), self.text_modulation(vector), turns, lengths
        )
