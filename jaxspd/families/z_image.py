"""Z-Image and Z-Image-Turbo (Alibaba, arXiv 2511.22699)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxspd.components.text_encoder import TextEncoder, TextPart
from jaxspd.configs import wrong
from jaxspd.convert.checkpoint import read_config
from jaxspd.convert.z_image import RULES
from jaxspd.errors import UsageError
from jaxspd.families.base import FLUX1_SPECTRUM, BaseFamily, check_parts, read_spectrum
from jaxspd.families.configs import check_rope, read_scheduler, read_transformer_config
from jaxspd.models.text.decoder_config import QWEN3_4B
from jaxspd.models.vae import AutoencoderKLConfig, read_autoencoder
from jaxspd.models.z_image import PATCH, ZImageConfig, ZImageTransformer, padded
from jaxspd.sampling.schedule import default_sigmas, flow_match_sigmas, override_shift
from jaxspd.spectral.spectrum import Spectrum

# Z-Image uses FLUX.1's VAE, so its latents have the same spectrum.
SPECTRUM = FLUX1_SPECTRUM
OFFICIAL_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 6.0}
TURBO_SHIFT = 3.0
OFFICIAL_VAE = AutoencoderKLConfig(latent_channels=16, block_out_channels=(128, 256, 512, 512))
# Options of the official class, with text-to-image's values. Other values mean editing, or other patches.
FIXED = {"all_patch_size": [PATCH], "all_f_patch_size": [1], "siglip_feat_dim": None}


@dataclass(frozen=True)
class Family(BaseFamily):
    """The recipe of a Z-Image checkpoint.

    Without a folder it is Z-Image as published, for planning and counting.
    """

    name: ClassVar[str] = "z_image"
    title: ClassVar[str] = "Z-Image"
    rules: ClassVar = RULES
    transformer: ClassVar = ZImageTransformer
    patch: ClassVar = (PATCH, PATCH)
    noise_levels: ClassVar[tuple[str, ...]] = ("official", "scheduler")

    folder: Path | None = None
    config: ZImageConfig = ZImageConfig()
    scheduler: dict = field(default_factory=lambda: OFFICIAL_SCHEDULER)
    vae: AutoencoderKLConfig = OFFICIAL_VAE
    spectrum: Spectrum = SPECTRUM
    text_tokens: int = 512

    @classmethod
    def from_folder(cls, folder: Path, transformer: Mapping | None = None) -> "Family":
        """Reads the configurations of a pipeline folder in diffusers' layout, but no weights.

        `transformer` takes the place of `transformer/config.json`. Raises UsageError for a folder that is
        incomplete or cannot run here.
        """
        check_parts(folder, cls.parts, transformer)
        given = transformer or read_config(folder / "transformer")
        foreign = [name for name, wanted in FIXED.items() if given.get(name, wanted) != wanted]
        if foreign:
            raise UsageError(f"{folder}: {', '.join(foreign)} belongs to another model than text-to-image")
        config = read_transformer_config(folder, ZImageConfig, transformer)
        vae = read_autoencoder(folder / "vae", "AutoencoderKL")
        if config.dim % config.n_heads:
            path = folder / "transformer" / "config.json"
            raise wrong(path, "n_heads", config.n_heads, f"a divisor of dim, {config.dim}")
        check_rope(folder, config.dim // config.n_heads, config.axes_dims, 3)
        channels = vae.channels
        if config.in_channels != channels:
            raise UsageError(
                f"{folder}: transformer/config.json wants {config.in_channels} channels, the VAE's latents "
                f"have {channels}; they do not belong together"
            )
        scheduler = read_scheduler(folder)
        if scheduler.get("use_dynamic_shifting"):
            raise UsageError(f"{folder}: scheduler_config.json asks for use_dynamic_shifting: not supported")
        return cls(folder, config, scheduler, vae, read_spectrum(folder, SPECTRUM))

    # The model cards' defaults.

    @property
    def distilled(self) -> bool:
        """Whether this is Z-Image-Turbo, made for few steps without guidance. Its scheduler shifts less."""
        return self.scheduler.get("shift", 1.0) <= TURBO_SHIFT

    @property
    def default_steps(self) -> int:
        return 8 if self.distilled else 50

    @property
    def default_guidance(self) -> float:
        return 0.0 if self.distilled else 4.0

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (1024, 1024) if self.distilled else (1280, 720)

    # Schedule, cost and guidance.

    def sigmas(
        self, steps: int, tokens: int, flow_shift: float | None = None, noise_levels: str = "official"
    ) -> np.ndarray:
        """σ `[steps + 1]`, whatever the picture's size.

        "official" means the levels of the authors and of the official pipeline: `linspace(1, 0, n + 1)`,
        shifted. "scheduler" means the scheduler's default levels, which the published stage splits use. Their
        last step starts at almost no noise.
        """
        config = override_shift(self.scheduler, flow_shift)
        if noise_levels == "scheduler":
            return default_sigmas(config, steps)
        return flow_match_sigmas(config, steps, tokens)

    def forward_flops(self, image_tokens: int) -> float:
        """FLOPs of one forward of one picture: matrix products and attention, text included."""
        c, image, text = self.config, padded(image_tokens), padded(self.text_tokens)

        def block(tokens: int) -> int:
            return tokens * (4 * c.dim**2 + 3 * c.dim * c.mlp_dim + 2 * tokens * c.dim)

        layers = c.n_layers * block(image + text) + c.n_refiner_layers * (block(image) + block(text))
        edges = c.dim * (2 * image_tokens * PATCH**2 * c.in_channels + text * c.cap_feat_dim)
        modulation = c.dim * c.vector_dim * (4 * (c.n_layers + c.n_refiner_layers) + 1)
        return 2.0 * (layers + edges + modulation)

    def live_channels(self, image_tokens: int) -> float:
        """A block's input and its MLP before and after the gate."""
        c = self.config
        return (padded(image_tokens) + padded(self.text_tokens)) * (4 * c.dim + 1.7 * c.mlp_dim)

    def guided(self, guidance_scale: float) -> bool:
        """Whether there is a second pass with a negative prompt: above 0, as in the official pipeline."""
        return guidance_scale > 0

    @staticmethod
    def combine(positive: jax.Array, negative: jax.Array, scale: jax.Array) -> jax.Array:
        """The guided velocity. The scale counts from `positive`: 0, not 1, leaves that as it is."""
        return positive + scale * (positive - negative)

    # The denoiser.

    def velocity(self, model, latents, sigma, conditioning):
        """The velocity of `latents` `[B, C, H, W]`."""
        time = jnp.broadcast_to(1 - sigma, latents.shape[:1])
        # The model's time, and the velocity that it predicts, go from noise to picture.
        return -model(latents, conditioning["text"], conditioning["lengths"], time)

    def abstract_conditioning(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of `condition`'s result, which are the same for every prompt.

        `text` has room for the learned padding after the longest prompt.
        """
        shape = (batch, padded(self.text_tokens), self.config.cap_feat_dim)
        return {
            "text": jax.ShapeDtypeStruct(shape, jnp.float32),
            "lengths": jax.ShapeDtypeStruct((batch,), jnp.int32),
        }

    # Texts.

    @property
    def texts(self) -> tuple[TextPart, ...]:
        width, tokens = self.config.cap_feat_dim, self.text_tokens
        return (TextPart("decoder", width, tokens, (-2,), chat=True, published=QWEN3_4B),)

    def encode(self, prompts: Sequence[str], encoders: Sequence[TextEncoder]) -> dict[str, np.ndarray]:
        """Qwen3's hidden states `text` `[B, T, cap_feat_dim]`, float32, and the prompts' `lengths` `[B]`.

        The states are those before the last layer, and zero after a prompt's end. A length is at most
        `text_tokens`, and T is `text_tokens` rounded up to a multiple of 32.
        """
        [encoder] = encoders
        filled = [
            encoder.tokenizer.chat(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, enable_thinking=True
            )
            for prompt in prompts
        ]
        ids, mask = encoder.tokenizer.encode(filled, self.text_tokens, side="right")
        text = np.where(mask[:, :, None], encoder(ids, mask), 0)
        # Only prompts are cut at `text_tokens`. The padding to a multiple of 32 is attended to as well.
        text = np.pad(text, [(0, 0), (0, padded(self.text_tokens) - self.text_tokens), (0, 0)])
        return {"text": text, "lengths": mask.sum(1, dtype=np.int32)}
