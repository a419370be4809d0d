"""Wan text-to-video: 2.1's 1.3B and 14B (Alibaba, arXiv 2503.20314), and 2.2's A14B of two transformers."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import ClassVar

import ftfy
import jax
import jax.numpy as jnp
import numpy as np

from jaxspd.components.text_encoder import TextEncoder, TextPart
from jaxspd.configs import wrong
from jaxspd.convert.checkpoint import read_config, read_json
from jaxspd.convert.wan import RULES
from jaxspd.errors import UsageError
from jaxspd.families.base import BaseFamily, check_parts, read_spectrum
from jaxspd.families.configs import read_scheduler, read_text_length, read_transformer_config
from jaxspd.models.text.t5 import UMT5_XXL
from jaxspd.models.vae import VideoAutoencoderConfig, read_autoencoder
from jaxspd.models.wan import WanConfig, WanTransformer
from jaxspd.sampling.schedule import default_sigmas, is_unipc, override_shift
from jaxspd.spectral.spectrum import Spectrum

# The spectrum of Wan 2.1's VAE over space, which the method's authors fitted on 9,050 videos (arXiv
# 2605.18736).
SPECTRUM = Spectrum(amplitude=219.484718, exponent=2.422687)
OFFICIAL_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
# The folder of Wan 2.2's transformer for low noise levels.
SECOND = "transformer_2"
CONFIG_1_3B = WanConfig(num_attention_heads=12, num_layers=30, ffn_dim=8960)
# The default negative prompt of the authors' own program. It means: garish colours, overexposure, still
# frames, blur, subtitles, artefacts, misshapen bodies. The model card's example has it in English.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class Family(BaseFamily):
    """The recipe of a Wan checkpoint.

    Without a folder it is Wan 2.1's 1.3B model as published, for planning and counting.
    """

    name: ClassVar[str] = "wan"
    rules: ClassVar = RULES
    transformer: ClassVar = WanTransformer
    vae_dtype: ClassVar = jnp.float32  # as the model card loads it
    aligns_size: ClassVar[bool] = True

    folder: Path | None = None
    config: WanConfig = CONFIG_1_3B
    scheduler: dict = field(default_factory=lambda: OFFICIAL_SCHEDULER)
    vae: VideoAutoencoderConfig = VideoAutoencoderConfig()
    spectrum: Spectrum = SPECTRUM
    text_tokens: int = 512
    # For Wan 2.2: the second transformer takes over at times below this share of 1000.
    boundary: float | None = None

    @classmethod
    def from_folder(cls, folder: Path, transformer: Mapping | None = None) -> "Family":
        """Reads the configurations of a pipeline folder in diffusers' layout, but no weights.

        `transformer` takes the place of `transformer/config.json`. Raises UsageError for a folder that is
        incomplete or cannot run here.
        """
        index = read_json(folder / "model_index.json")
        if index.get("expand_timesteps"):
            raise UsageError(
                f"{folder} is Wan 2.2's TI2V-5B; jaxspd runs Wan text-to-video: 2.1, or 2.2's A14B"
            )
        check_parts(folder, cls.parts, transformer)
        config = read_transformer_config(folder, WanConfig, transformer)
        boundary = read_boundary(folder, index, config)
        vae = read_autoencoder(folder / "vae", "AutoencoderKLWan")
        whole = transformer or read_config(folder / "transformer")
        if whole.get("image_dim") or whole.get("added_kv_proj_dim"):
            raise UsageError(f"{folder} animates pictures; jaxspd runs Wan 2.1 text-to-video")
        path = folder / "transformer" / "config.json"
        if config.attention_head_dim % 2:
            raise wrong(path, "attention_head_dim", config.attention_head_dim, "an even number")
        if config.patch_size[0] != 1:
            raise wrong(path, "patch_size", config.patch_size, "1 in time")
        channels = vae.channels
        if not config.in_channels == (config.out_channels or config.in_channels) == channels:
            raise UsageError(
                f"{folder}: transformer/config.json wants {config.in_channels} channels, the VAE's latents "
                f"have {channels}; they do not belong together"
            )
        return cls(
            folder,
            config,
            read_scheduler(folder),
            vae,
            read_spectrum(folder, SPECTRUM),
            read_text_length(folder, "tokenizer", 512),
            boundary=boundary,
        )

    # Wan 2.2's two transformers.

    @property
    def title(self) -> str:  # type: ignore[override]  # checkpoints differ in it
        return "Wan 2.1" if self.boundary is None else "Wan 2.2"

    @property
    def transformers(self) -> tuple[str, ...]:  # type: ignore[override]  # checkpoints differ in it
        return ("transformer",) if self.boundary is None else ("transformer", SECOND)

    def is_second(self, sigma: float) -> bool:
        """Whether the transformer for low noise takes a step that begins at σ. The model's time decides."""
        return self.boundary is not None and self.time(np.float32(sigma), np) < 1000 * self.boundary

    # The model cards' defaults.

    default_negative_prompt: ClassVar[str] = NEGATIVE

    @property
    def default_steps(self) -> int:
        return 50 if self.boundary is None else 40

    @property
    def default_guidance(self) -> float:
        return 5.0 if self.boundary is None else 4.0

    @property
    def default_guidance_2(self) -> float | None:
        return None if self.boundary is None else 3.0

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (480, 832) if self.boundary is None else (720, 1280)

    default_frames: ClassVar[int] = 81
    default_fps: ClassVar[int] = 16

    # Geometry, schedule and cost.

    @property
    def patch(self) -> tuple[int, ...]:  # type: ignore[override]  # checkpoints differ in it
        return self.config.patch_size

    @property
    def frames_per_latent(self) -> int:
        """How many frames of video a latent frame holds. The first latent frame holds only one."""
        return self.vae.frames_per_latent

    def leading(self, frames: int) -> tuple[int, ...]:
        """The sizes of the latents' axes between batch and grid: (channels, latent frames)."""
        return self.vae.channels, (frames - 1) // self.frames_per_latent + 1

    def sigmas(self, steps: int, tokens: int, flow_shift: float | None = None) -> np.ndarray:
        """σ `[steps + 1]` of the checkpoint's scheduler, whichever solver uses them."""
        return default_sigmas(override_shift(self.scheduler, flow_shift), steps)

    def forward_flops(self, tokens: int) -> float:
        """FLOPs of one forward of one video: matrix products and attention, text included."""
        c, text = self.config, self.text_tokens
        self_attention = tokens * (4 * c.dim**2 + 2 * tokens * c.dim)
        cross_attention = 2 * (tokens + text) * c.dim**2 + 2 * tokens * text * c.dim
        mlp = 2 * tokens * c.dim * c.ffn_dim
        patches = 2 * tokens * c.dim * c.in_channels * prod(c.patch_size)
        embeddings = text * c.dim * (c.text_dim + c.dim) + c.dim * (c.freq_dim + 7 * c.dim)
        return 2.0 * (c.num_layers * (self_attention + cross_attention + mlp) + patches + embeddings)

    def live_channels(self, tokens: int) -> float:
        """A block's input, and its MLP's input, hidden layer and result."""
        return tokens * (3.3 * self.config.dim + 1.08 * self.config.ffn_dim)

    # The denoiser.

    def velocity(self, model, latents, sigma, conditioning):
        """The velocity of `latents` `[B, C, T, H, W]`."""
        time = jnp.broadcast_to(self.time(sigma, jnp), latents.shape[:1])
        return model(latents, conditioning["text"], time)

    def time(self, sigma, numpy):
        """The model's time at σ, from 0 to 1000, computed by `numpy`: NumPy or jax.numpy.

        It is an integer with the official UniPC scheduler, which rounds it down. Euler's does not.
        """
        time = numpy.float32(1000) * sigma
        return numpy.floor(time) if is_unipc(self.scheduler) else time

    def abstract_conditioning(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of `condition`'s result, which are the same for every prompt."""
        shape = (batch, self.text_tokens, self.config.text_dim)
        return {"text": jax.ShapeDtypeStruct(shape, jnp.float32)}

    # Texts.

    @property
    def texts(self) -> tuple[TextPart, ...]:
        return (TextPart("t5", self.config.text_dim, self.text_tokens, published=UMT5_XXL),)

    def encode(self, prompts: Sequence[str], encoders: Sequence[TextEncoder]) -> dict[str, np.ndarray]:
        """UMT5's last hidden states `text` `[B, T, text_dim]`, float32, zero after a prompt's end."""
        [umt5] = encoders
        ids, mask = umt5.tokenizer.encode([clean(prompt) for prompt in prompts], self.text_tokens)
        return {"text": np.where(mask[:, :, None], umt5(ids, mask), 0)}


def read_boundary(folder: Path, index: dict, config: WanConfig) -> float | None:
    """The `boundary` of two transformers, or None if there is only one.

    Raises UsageError for a bad boundary_ratio, if the two differ in shape, and if the second is missing.
    """
    boundary, second = index.get("boundary_ratio"), (folder / SECOND).is_dir()
    if boundary is None and not second:
        return None
    path = folder / "model_index.json"
    if not isinstance(boundary, int | float) or isinstance(boundary, bool) or not 0 < boundary < 1:
        raise wrong(path, "boundary_ratio", boundary, "a number between 0 and 1, as Wan 2.2 has it")
    check_parts(folder, (SECOND,))
    if read_transformer_config(folder, WanConfig, part=SECOND) != config:
        raise UsageError(
            f"{folder}: the config.json of transformer and {SECOND} differ; they do not belong together"
        )
    return float(boundary)


def clean(prompt: str) -> str:
    """`prompt` as the official pipeline gives it to the tokenizer.

    Broken Unicode is repaired, HTML entities are resolved, and each run of white space becomes one space.
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())
