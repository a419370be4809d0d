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

# Wan 2.1's VAE; the spatial spectrum of 9,050 videos, by the method's authors (arXiv 2605.18736).
SPECTRUM = Spectrum(amplitude=219.484718, exponent=2.422687)
OFFICIAL_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
# The folder of Wan 2.2's transformer for less noise.
SECOND = "transformer_2"
CONFIG_1_3B = WanConfig(num_attention_heads=12, num_layers=30, ffn_dim=8960)
# What the authors' own program leads away from where nothing is said: garish colours, overexposure, still
# frames, blur, subtitles, artefacts, misshapen bodies. The example of the model card says it in English.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class Family(BaseFamily):
    """What the sampler and the generator need to know of a Wan checkpoint.

    Without a folder it is the 1.3B model as published, good for planning and counting.
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
    # Of Wan 2.2: the share of the noise's time below which the second transformer takes over.
    boundary: float | None = None

    @classmethod
    def from_folder(cls, folder: Path, transformer: Mapping | None = None) -> "Family":
        """Reads the configuration of a pipeline folder in diffusers' layout; no weights. `transformer` takes
        the place of `transformer/config.json`.
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

    # Two transformers, of Wan 2.2.

    @property
    def title(self) -> str:
        return "Wan 2.1" if self.boundary is None else "Wan 2.2"

    @property
    def transformers(self) -> tuple[str, ...]:
        return ("transformer",) if self.boundary is None else ("transformer", SECOND)

    def is_second(self, sigma: float) -> bool:
        """Whether the transformer for less noise takes a step that begins at σ, by the model's own time."""
        return self.boundary is not None and self.time(np.float32(sigma), np) < 1000 * self.boundary

    # Defaults: those of the model cards.

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
    def patch(self) -> tuple[int, ...]:
        return self.config.patch_size

    @property
    def frames_per_latent(self) -> int:
        """The first latent frame holds one frame of video, every other this many."""
        return self.vae.frames_per_latent

    def leading(self, frames: int) -> tuple[int, ...]:
        """The axes of latents between batch and grid: channels and latent frames."""
        return self.vae.channels, (frames - 1) // self.frames_per_latent + 1

    def sigmas(self, steps: int, tokens: int, flow_shift: float | None = None) -> np.ndarray:
        """σ `[steps + 1]`: of the checkpoint's scheduler, whichever solver steps through them."""
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
        """A block's input and what its MLP reads, holds and adds."""
        return tokens * (3.3 * self.config.dim + 1.08 * self.config.ffn_dim)

    # The denoiser.

    def velocity(self, model, latents, sigma, conditioning):
        """The velocity of `latents` `[B, C, T, H, W]`."""
        time = jnp.broadcast_to(self.time(sigma, jnp), latents.shape[:1])
        return model(latents, conditioning["text"], time)

    def time(self, sigma, numpy):
        """The model's time at σ, computed by NumPy or JAX's: the official UniPC scheduler counts its time
        steps in whole thousandths, Euler's does not.
        """
        time = numpy.float32(1000) * sigma
        return numpy.floor(time) if is_unipc(self.scheduler) else time

    def abstract_conditioning(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of `condition`'s result: the same for every prompt."""
        shape = (batch, self.text_tokens, self.config.text_dim)
        return {"text": jax.ShapeDtypeStruct(shape, jnp.float32)}

    # Texts.

    @property
    def texts(self) -> tuple[TextPart, ...]:
        return (TextPart("t5", self.config.text_dim, self.text_tokens, published=UMT5_XXL),)

    def encode(self, prompts: Sequence[str], encoders: Sequence[TextEncoder]) -> dict[str, np.ndarray]:
        """UMT5's last hidden states `text` `[B, T, text_dim]`, float32, zero where a prompt has ended."""
        [umt5] = encoders
        ids, mask = umt5.tokenizer.encode([clean(prompt) for prompt in prompts], self.text_tokens)
        return {"text": np.where(mask[:, :, None], umt5(ids, mask), 0)}


def read_boundary(folder: Path, index: dict, config: WanConfig) -> float | None:
    """Where the second of two transformers takes over; None where there is one. UsageError if they are not of
    one shape, or one of the two is missing.
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
    """`prompt` as the official pipeline feeds it to the tokenizer: broken Unicode mended, HTML entities
    resolved, runs of white space made one space.
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())
