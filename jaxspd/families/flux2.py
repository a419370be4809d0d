"""FLUX.2 [dev], [klein] 4B and 9B, and the undistilled [klein] base models (Black Forest Labs, 2025)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jaxspd.components.text_encoder import TextEncoder, TextPart
from jaxspd.convert.checkpoint import read_json
from jaxspd.convert.flux2 import RULES
from jaxspd.errors import UsageError
from jaxspd.families.base import FLUX1_SPECTRUM, BaseFamily, check_parts, read_spectrum
from jaxspd.families.configs import check_rope, read_scheduler, read_transformer_config
from jaxspd.models.flux2 import Flux2Config, Flux2Transformer
from jaxspd.models.packing import patchify, unpatchify
from jaxspd.models.text.decoder_config import MISTRAL_SMALL, QWEN3_4B, QWEN3_8B
from jaxspd.models.vae import AutoencoderKLFlux2Config, read_autoencoder
from jaxspd.sampling.schedule import empirical_shift, flow_match_sigmas, override_shift
from jaxspd.spectral.expansion import EXPANSION, Expansion, expand, share
from jaxspd.spectral.spectrum import Spectrum

OFFICIAL_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
KLEIN_4B = Flux2Config(
    num_layers=5,
    num_single_layers=20,
    num_attention_heads=24,
    joint_attention_dim=7680,
    guidance_embeds=False,
)
# The hidden layers of the text encoder that are read, and the system message that [dev] puts before the
# prompt.
DEV_STATES = (10, 20, 30)
KLEIN_STATES = (9, 18, 27)
# The published text encoders, by their width.
PUBLISHED_TEXTS = {float(config.hidden_size): config for config in (QWEN3_4B, QWEN3_8B, MISTRAL_SMALL)}
DEV_SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)


def expand_unpatchified(
    latents: jax.Array, noise: jax.Array, sigma: jax.Array, kappa: jax.Array, transform: str = "dct"
) -> jax.Array:
    """`spectral.expansion.expand` on the unpatchified grid: `[B, 4C, h, w]` to `noise`'s `[B, 4C, H, W]`.

    On the patchified grid a patch's four latents are four channels, and each grows by itself: as if it were
    at the patch's centre, half a fine latent from its place. Here they grow as neighbours. They stay
    normalised, so that their noise is white; this relies on the four having nearly the same statistics. The
    published rule for the patchified grid decides when to grow.
    """
    return patchify(expand(unpatchify(latents), unpatchify(noise), sigma, kappa, transform))


def share_unpatchified(
    noise: jax.Array, grids: Sequence[tuple[int, int]], transform: str = "dct"
) -> list[jax.Array]:
    """`spectral.expansion.share` on the unpatchified grids of the patchified `grids`."""
    beneath = [(2 * height, 2 * width) for height, width in grids]
    return [patchify(part) for part in share(unpatchify(noise), beneath, transform)]


@dataclass(frozen=True)
class Family(BaseFamily):
    """The recipe of a FLUX.2 checkpoint.

    Latents are patchified and normalised: `[B, 128, h, w]`, with sides of a sixteenth of the picture's.
    Without a folder it is FLUX.2 [klein] 4B as published, for planning and counting.
    """

    name: ClassVar[str] = "flux2"
    title: ClassVar[str] = "FLUX.2"
    rules: ClassVar = RULES
    transformer: ClassVar = Flux2Transformer
    patch: ClassVar = (1, 1)
    borrowed_spectrum: ClassVar = FLUX1_SPECTRUM
    expansions: ClassVar = {
        "patchified": EXPANSION,
        "latent": Expansion(expand_unpatchified, share_unpatchified),
    }

    folder: Path | None = None
    config: Flux2Config = KLEIN_4B
    scheduler: dict = field(default_factory=lambda: OFFICIAL_SCHEDULER)
    vae: AutoencoderKLFlux2Config = AutoencoderKLFlux2Config()
    spectrum: Spectrum = FLUX1_SPECTRUM
    text_tokens: int = 512
    klein: bool = True
    distilled: bool = True

    @classmethod
    def from_folder(cls, folder: Path, transformer: Mapping | None = None) -> "Family":
        """Reads the configurations of a pipeline folder in diffusers' layout, but no weights.

        `transformer` takes the place of `transformer/config.json`. Raises UsageError for a folder that is
        incomplete or cannot run here.
        """
        check_parts(folder, cls.parts, transformer)
        index = read_json(folder / "model_index.json")
        klein = index["_class_name"] == "Flux2KleinPipeline"
        config = read_transformer_config(folder, Flux2Config, transformer)
        vae = read_autoencoder(folder / "vae", "AutoencoderKLFlux2")
        check_rope(folder, config.attention_head_dim, config.axes_dims_rope, 4)
        channels = vae.channels
        if (config.in_channels, config.out_channels or config.in_channels, config.patch_size) != (
            channels,
            channels,
            1,
        ):
            raise UsageError(
                f"{folder}: transformer/config.json wants {config.in_channels} channels in patches of "
                f"{config.patch_size}, the VAE's latents patchify to {channels}; they do not belong together"
            )
        return cls(
            folder,
            config,
            read_scheduler(folder),
            vae,
            read_spectrum(folder, FLUX1_SPECTRUM),
            klein=klein,
            distilled=not klein or bool(index.get("is_distilled")),
        )

    # The model cards' defaults.

    @property
    def default_steps(self) -> int:
        return 4 if self.klein and self.distilled else 50

    @property
    def default_guidance(self) -> float:
        return 1.0 if self.klein and self.distilled else 4.0

    default_size: ClassVar[tuple[int, int]] = (1024, 1024)

    # Schedule and cost.

    def sigmas(self, steps: int, tokens: int, flow_shift: float | None = None) -> np.ndarray:
        """σ `[steps + 1]` for a picture of `tokens` tokens at full resolution."""
        config = override_shift(self.scheduler, flow_shift)
        return flow_match_sigmas(config, steps, tokens, mu=empirical_shift(tokens, steps))

    def forward_flops(self, tokens: int) -> float:
        """FLOPs of one forward of one picture: matrix products and attention, text included."""
        c, both = self.config, tokens + self.text_tokens
        # Either kind of block does 4 D² per token around the attention, 3 D F in the gated MLP, and 2 N D in
        # the attention itself.
        block = both * (4 * c.dim**2 + 3 * c.dim * c.mlp_dim + 2 * both * c.dim)
        edges = c.dim * (2 * tokens * c.in_channels + self.text_tokens * c.joint_attention_dim)
        return 2.0 * ((c.num_layers + c.num_single_layers) * block + edges + 18 * c.dim**2)

    def live_channels(self, tokens: int) -> float:
        """A single block's input, queries, keys, values and MLP before and after their activations."""
        c = self.config
        return (tokens + self.text_tokens) * (4 * c.dim + 4.2 * c.mlp_dim)

    def guided(self, guidance_scale: float) -> bool:
        """Whether there is a second pass with a negative prompt: above 1, for undistilled models only."""
        return not self.distilled and guidance_scale > 1

    # The denoiser.

    def velocity(self, model, latents, sigma, conditioning):
        """The velocity of `latents` `[B, 4C, H, W]`."""
        grid = latents.shape[-2:]
        tokens = model(
            rearrange(latents, "b c h w -> b (h w) c"),
            grid,
            conditioning["text"],
            jnp.broadcast_to(sigma, latents.shape[:1]),
            conditioning.get("guidance"),
        )
        return rearrange(tokens, "b (h w) c -> b c h w", h=grid[0])

    def abstract_conditioning(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of `condition`'s result, which are the same for every prompt."""
        shapes: dict[str, tuple[int, ...]] = {
            "text": (batch, self.text_tokens, self.config.joint_attention_dim)
        }
        if self.config.guidance_embeds:
            shapes["guidance"] = (batch,)
        return {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}

    def condition(self, encoded: dict[str, np.ndarray], guidance: float) -> dict[str, np.ndarray]:
        """The encoded prompts, with the guidance scale `[B]` if the transformer embeds it."""
        if not self.config.guidance_embeds:
            return encoded
        return {**encoded, "guidance": np.full(len(encoded["text"]), guidance, np.float32)}

    # Texts.

    @property
    def texts(self) -> tuple[TextPart, ...]:
        states = KLEIN_STATES if self.klein else DEV_STATES
        width = self.config.joint_attention_dim / len(states)
        published = PUBLISHED_TEXTS.get(width)
        return (TextPart("decoder", width, self.text_tokens, states, chat=True, published=published),)

    def encode(self, prompts: Sequence[str], encoders: Sequence[TextEncoder]) -> dict[str, np.ndarray]:
        """Three hidden layers of the text encoder, joined: `text` `[B, T, joint_attention_dim]`, float32.

        Padding is not masked, since the model was trained to attend to it.
        """
        [encoder] = encoders
        filled = [self._filled(prompt, encoder.tokenizer) for prompt in prompts]
        # The template has written all special tokens already.
        return {"text": encoder(*encoder.tokenizer.encode(filled, self.text_tokens, special=False))}

    def _filled(self, prompt: str, tokenizer) -> str:
        """The encoder's input: a conversation with the prompt, which for [dev] begins with `DEV_SYSTEM`."""
        if self.klein:
            messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
            return tokenizer.chat(messages, add_generation_prompt=True, enable_thinking=False)
        # A prompt must not contain the token that stands for a picture.
        said = (("system", DEV_SYSTEM), ("user", prompt.replace("[IMG]", "")))
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
        return tokenizer.chat(messages, add_generation_prompt=False)
