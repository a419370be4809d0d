"""FLUX.1 [dev] and [schnell] (Black Forest Labs, 2024)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxspd.components.text_encoder import TextEncoder, TextPart
from jaxspd.convert.flux1 import RULES
from jaxspd.errors import UsageError
from jaxspd.families.base import FLUX1_SPECTRUM, BaseFamily, check_parts, is_named, read_spectrum
from jaxspd.families.configs import check_rope, read_scheduler, read_text_length, read_transformer_config
from jaxspd.models.flux1 import Flux1Config, Flux1Transformer
from jaxspd.models.packing import pack, unpack
from jaxspd.models.text.clip import CLIP_L
from jaxspd.models.text.t5 import T5_XXL
from jaxspd.models.vae import AutoencoderKLConfig, read_autoencoder
from jaxspd.sampling.schedule import flow_match_sigmas, override_shift
from jaxspd.spectral.spectrum import Spectrum

DEV_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
CLIP_TOKENS = 77
OFFICIAL_VAE = AutoencoderKLConfig(latent_channels=16, block_out_channels=(128, 256, 512, 512))


@dataclass(frozen=True)
class Family(BaseFamily):
    """The recipe of a FLUX.1 checkpoint.

    Without a folder it is FLUX.1 [dev] as published, for planning and counting.
    """

    name: ClassVar[str] = "flux1"
    title: ClassVar[str] = "FLUX.1"
    rules: ClassVar = RULES
    transformer: ClassVar = Flux1Transformer
    parts: ClassVar = (
        "scheduler",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "transformer",
        "vae",
    )

    folder: Path | None = None
    config: Flux1Config = Flux1Config(guidance_embeds=True)
    scheduler: dict = field(default_factory=lambda: DEV_SCHEDULER)
    vae: AutoencoderKLConfig = OFFICIAL_VAE
    spectrum: Spectrum = FLUX1_SPECTRUM
    text_tokens: int = 512
    # Whether this is FLUX.1-Krea, whose files are like [dev]'s.
    krea: bool = False

    @classmethod
    def from_folder(cls, folder: Path, transformer: Mapping | None = None) -> "Family":
        """Reads the configurations of a pipeline folder in diffusers' layout, but no weights.

        `transformer` takes the place of `transformer/config.json`. Raises UsageError for a folder that is
        incomplete or cannot run here.
        """
        check_parts(folder, cls.parts, transformer)
        config = read_transformer_config(folder, Flux1Config, transformer)
        vae = read_autoencoder(folder / "vae", "AutoencoderKL")
        check_rope(folder, config.attention_head_dim, config.axes_dims_rope, 3)
        tokens = 4 * vae.channels
        if (config.in_channels, config.patch_size) != (tokens, 1):
            raise UsageError(
                f"{folder}: transformer/config.json wants {config.in_channels} channels in patches of "
                f"{config.patch_size}, the VAE's latents pack into {tokens}; they do not belong together"
            )
        # The official pipelines take 512 tokens for [dev]. For [schnell] its model card says 256.
        scheduler = read_scheduler(folder)
        text_tokens = read_text_length(
            folder, "tokenizer_2", 512 if scheduler.get("use_dynamic_shifting") else 256
        )
        return cls(
            folder,
            config,
            scheduler,
            vae,
            read_spectrum(folder, FLUX1_SPECTRUM),
            text_tokens,
            krea=is_named(folder, "krea", "FLUX.1-Krea"),
        )

    # The model cards' defaults.

    @property
    def distilled(self) -> bool:
        """Whether this is [schnell], made for few steps. Its scheduler has no dynamic shift."""
        return not self.scheduler.get("use_dynamic_shifting")

    @property
    def default_steps(self) -> int:
        return 28 if self.krea else 4 if self.distilled else 50

    @property
    def default_guidance(self) -> float:
        if not self.config.guidance_embeds:
            return 0.0
        return 4.5 if self.krea else 3.5

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.vae.sample_size, self.vae.sample_size

    # Schedule and cost.

    def sigmas(self, steps: int, tokens: int, flow_shift: float | None = None) -> np.ndarray:
        """σ `[steps + 1]` for a picture of `tokens` tokens at full resolution."""
        return flow_match_sigmas(override_shift(self.scheduler, flow_shift), steps, tokens)

    def forward_flops(self, image_tokens: int) -> float:
        """FLOPs of one forward of one picture: matrix products and attention, text included."""
        c, tokens = self.config, image_tokens + self.text_tokens
        # A double block and a single block do the same work per token: 4 D² around the attention, 8 D² in the
        # MLP, and 2 N D in the attention itself.
        layers = (c.num_layers + c.num_single_layers) * tokens * (12 * c.dim**2 + 2 * tokens * c.dim)
        edges = c.dim * (2 * image_tokens * c.in_channels + self.text_tokens * c.joint_attention_dim)
        modulation = c.dim**2 * (12 * c.num_layers + 3 * c.num_single_layers + 2)
        return 2.0 * (layers + edges + modulation)

    def live_channels(self, image_tokens: int) -> float:
        """A single block's input, queries, keys, values and MLP before and after their activations."""
        return (image_tokens + self.text_tokens) * 12.4 * self.config.dim

    def guided(self, guidance_scale: float) -> bool:
        """Whether there is a second pass with a negative prompt: never, as FLUX.1 is guidance-distilled."""
        return False

    # The denoiser.

    def velocity(self, model, latents, sigma, conditioning):
        """The velocity of `latents` `[B, C, H, W]`."""
        grid = (latents.shape[-2] // 2, latents.shape[-1] // 2)
        tokens = model(
            pack(latents),
            grid,
            conditioning["text"],
            conditioning["pooled"],
            jnp.broadcast_to(sigma, latents.shape[:1]),
            conditioning.get("guidance"),
        )
        return unpack(tokens, grid)

    def abstract_conditioning(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of `condition`'s result, which are the same for every prompt."""
        c = self.config
        shapes = {
            "text": (batch, self.text_tokens, c.joint_attention_dim),
            "pooled": (batch, c.pooled_projection_dim),
        }
        if c.guidance_embeds:
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
        c = self.config
        return (
            TextPart("clip", c.pooled_projection_dim, CLIP_TOKENS, published=CLIP_L),
            TextPart(
                "t5",
                c.joint_attention_dim,
                self.text_tokens,
                part="text_encoder_2",
                tokenizer="tokenizer_2",
                published=T5_XXL,
            ),
        )

    def encode(self, prompts: Sequence[str], encoders: Sequence[TextEncoder]) -> dict[str, np.ndarray]:
        """T5's last hidden states `text` `[B, T, joint_attention_dim]` and CLIP's `pooled`
        `[B, pooled_projection_dim]`, float32.
        """
        clip, t5 = encoders
        ids, _ = clip.tokenizer.encode(prompts, CLIP_TOKENS)
        pooled = clip(ids)
        # There is no attention mask: the official model was trained to attend to padding.
        ids, _ = t5.tokenizer.encode(prompts, self.text_tokens)
        return {"text": t5(ids), "pooled": pooled}
