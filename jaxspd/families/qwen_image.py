"""Qwen-Image (Alibaba, arXiv 2508.02324)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxspd.components.text_encoder import TextEncoder, TextPart
from jaxspd.convert.checkpoint import read_config
from jaxspd.convert.qwen_image import RULES
from jaxspd.errors import UsageError
from jaxspd.families.base import FLUX1_SPECTRUM, BaseFamily, check_parts, is_named, read_spectrum
from jaxspd.families.configs import check_rope, read_scheduler, read_transformer_config
from jaxspd.models.packing import pack, unpack
from jaxspd.models.qwen_image import QwenImageConfig, QwenImageTransformer
from jaxspd.models.text.decoder_config import QWEN2_5_VL_7B
from jaxspd.models.vae import VideoAutoencoderConfig, read_autoencoder
from jaxspd.sampling.guidance import extrapolate
from jaxspd.sampling.schedule import flow_match_sigmas, override_shift
from jaxspd.spectral.spectrum import Spectrum

OFFICIAL_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
SUFFIX, SUFFIX_CHINESE = ", Ultra HD, 4K, cinematic composition.", ", 超清，4K，电影级构图."
# Options of the official class for editing and for layered pictures.
FOREIGN = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
# The official prompt template, and the number of its tokens before the prompt, whose hidden states are
# dropped.
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
TEMPLATE_TOKENS = 34
# The negative prompt on Qwen-Image-2512's card. It means: low resolution and quality, deformed limbs and
# fingers, oversaturated, waxen, faces without detail, too smooth, looks generated; chaotic composition;
# blurred or distorted writing.
NEGATIVE_2512 = (
    "低分辨率，低画质，肢体畸形，手指畸形，画面过饱和，蜡像感，人脸无细节，过度光滑，画面具有AI感。"
    "构图混乱。文字模糊，扭曲。"
)


@dataclass(frozen=True)
class Family(BaseFamily):
    """The recipe of a Qwen-Image checkpoint.

    Without a folder it is Qwen-Image as published, for planning and counting.
    """

    name: ClassVar[str] = "qwen_image"
    title: ClassVar[str] = "Qwen-Image"
    rules: ClassVar = RULES
    transformer: ClassVar = QwenImageTransformer
    borrowed_spectrum: ClassVar = FLUX1_SPECTRUM

    folder: Path | None = None
    config: QwenImageConfig = QwenImageConfig()
    scheduler: dict = field(default_factory=lambda: OFFICIAL_SCHEDULER)
    # An autoencoder of videos; a picture is a video of one frame.
    vae: VideoAutoencoderConfig = VideoAutoencoderConfig()
    spectrum: Spectrum = FLUX1_SPECTRUM
    text_tokens: int = 512
    # Whether this is Qwen-Image of August 2025, or Qwen-Image-2512. Their files are alike.
    august: bool = False
    december: bool = False

    @classmethod
    def from_folder(cls, folder: Path, transformer: Mapping | None = None) -> "Family":
        """Reads the configurations of a pipeline folder in diffusers' layout, but no weights.

        `transformer` takes the place of `transformer/config.json`. Raises UsageError for a folder that is
        incomplete or cannot run here.
        """
        check_parts(folder, cls.parts, transformer)
        given = transformer or read_config(folder / "transformer")
        foreign = [name for name in FOREIGN if given.get(name)]
        if foreign:
            raise UsageError(f"{folder}: {', '.join(foreign)} belongs to another model than text-to-image")
        config = read_transformer_config(folder, QwenImageConfig, transformer)
        vae = read_autoencoder(folder / "vae", "AutoencoderKLQwenImage")
        check_rope(folder, config.attention_head_dim, config.axes_dims_rope, 3)
        channels = vae.channels
        ours = (config.in_channels, config.out_channels, config.patch_size)
        if ours != (4 * channels, channels, 2):
            raise UsageError(
                f"{folder}: transformer/config.json wants {config.in_channels} channels in, "
                f"{config.out_channels} out, in patches of {config.patch_size}; the VAE's latents have "
                f"{channels}: they do not belong together"
            )
        return cls(
            folder,
            config,
            read_scheduler(folder),
            vae,
            read_spectrum(folder, FLUX1_SPECTRUM),
            august=is_named(folder, "(^|--)qwen-image$", "Qwen-Image of August 2025"),
            december=is_named(folder, "image-2512", "Qwen-Image-2512"),
        )

    # The model card's defaults.

    default_steps: ClassVar[int] = 50
    default_guidance: ClassVar[float] = 4.0
    default_size: ClassVar[tuple[int, int]] = (928, 1664)

    @property
    def default_negative_prompt(self) -> str:  # type: ignore[override]  # checkpoints differ in it
        return NEGATIVE_2512 if self.december else " "

    def default_prompt_suffix(self, prompt: str) -> str:
        """The text that the August card puts after a prompt; it is Chinese after a Chinese prompt."""
        if not self.august:
            return ""
        return SUFFIX_CHINESE if re.search("[\u4e00-\u9fff]", prompt) else SUFFIX

    # Schedule, cost and guidance.

    def sigmas(self, steps: int, tokens: int, flow_shift: float | None = None) -> np.ndarray:
        """σ `[steps + 1]` for a picture of `tokens` tokens at full resolution."""
        return flow_match_sigmas(override_shift(self.scheduler, flow_shift), steps, tokens)

    def forward_flops(self, tokens: int) -> float:
        """FLOPs of one forward of one picture: matrix products and attention, text included."""
        c, both = self.config, tokens + self.text_tokens
        layers = c.num_layers * both * (12 * c.dim**2 + 2 * both * c.dim)
        edges = c.dim * (2 * tokens * c.in_channels + self.text_tokens * c.joint_attention_dim)
        modulation = c.dim**2 * (12 * c.num_layers + 3)
        return 2.0 * (layers + edges + modulation)

    def live_channels(self, tokens: int) -> float:
        """A block's inputs, queries, keys and values, and the attention's result."""
        return (tokens + self.text_tokens) * 6.8 * self.config.dim

    @staticmethod
    def combine(positive: jax.Array, negative: jax.Array, scale: jax.Array) -> jax.Array:
        """The guided velocity `[B, C, h, w]`, with each token's norm rescaled to that of `positive`."""
        grid = (positive.shape[-2] // 2, positive.shape[-1] // 2)
        wanted, guided = pack(positive), pack(extrapolate(positive, negative, scale))
        norms = (jnp.linalg.norm(tokens, axis=-1, keepdims=True) for tokens in (wanted, guided))
        target, found = norms
        return unpack(guided * (target / found), grid)

    # The denoiser.

    def velocity(self, model, latents, sigma, conditioning):
        """The velocity of `latents` `[B, C, H, W]`."""
        grid = (latents.shape[-2] // 2, latents.shape[-1] // 2)
        tokens = model(
            pack(latents),
            grid,
            conditioning["text"],
            conditioning["lengths"],
            jnp.broadcast_to(sigma, latents.shape[:1]),
        )
        return unpack(tokens, grid)

    def abstract_conditioning(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of `condition`'s result, which are the same for every prompt."""
        shape = (batch, self.text_tokens, self.config.joint_attention_dim)
        return {
            "text": jax.ShapeDtypeStruct(shape, jnp.float32),
            "lengths": jax.ShapeDtypeStruct((batch,), jnp.int32),
        }

    # Texts.

    @property
    def texts(self) -> tuple[TextPart, ...]:
        tokens = TEMPLATE_TOKENS + self.text_tokens
        return (TextPart("decoder", self.config.joint_attention_dim, tokens, published=QWEN2_5_VL_7B),)

    def encode(self, prompts: Sequence[str], encoders: Sequence[TextEncoder]) -> dict[str, np.ndarray]:
        """Qwen2.5-VL's last hidden states `text` `[B, T, joint_attention_dim]`, float32, and `lengths` `[B]`.

        The states of the template's beginning are dropped. States after a prompt's end are zero.
        """
        [encoder] = encoders
        filled = [TEMPLATE.format(prompt) for prompt in prompts]
        ids, mask = encoder.tokenizer.encode(filled, self.text_tokens, TEMPLATE_TOKENS, side="right")
        text = np.where(mask[:, :, None], encoder(ids, mask), 0)[:, TEMPLATE_TOKENS:]
        return {"text": text, "lengths": mask.sum(1, dtype=np.int32) - TEMPLATE_TOKENS}
