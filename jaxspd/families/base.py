"""What every family keeps of a checkpoint, and does alike."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx

from jaxspd.components.autoencoder import Autoencoder
from jaxspd.components.text_encoder import STEM as TEXT_STEM
from jaxspd.components.text_encoder import TextEncoder, TextPart
from jaxspd.convert.checkpoint import STEM, read_json
from jaxspd.convert.table import Rule
from jaxspd.errors import UsageError, first_line
from jaxspd.models.quantized import quantize
from jaxspd.models.vae import VaeConfig
from jaxspd.runtime.layerwise import HOST
from jaxspd.runtime.residency import Residency
from jaxspd.sampling.guidance import extrapolate
from jaxspd.spectral.expansion import EXPANSION, Expansion
from jaxspd.spectral.spectrum import Spectrum
from jaxspd.target import Target

log = logging.getLogger("jaxspd")

# Of FLUX.1's VAE; fitted on 105k images by the method's authors (arXiv 2605.18736).
FLUX1_SPECTRUM = Spectrum(amplitude=203.615097, exponent=1.915461)


@dataclass(frozen=True)
class BaseFamily:
    """A recipe: how the components of a pipeline make pictures or videos, from their configurations alone.

    A family adds its defaults, its σ schedule, its denoiser and what this reads of texts. Latents are
    `[B, *leading, h, w]`, leading being (channels,) for pictures and (channels, frames) for videos. Without a
    folder a family is its published checkpoint, good for planning and counting.
    """

    name: ClassVar[str]  # as in `jaxspd plan --family`
    title: ClassVar[str]
    rules: ClassVar[tuple[Rule, ...]]
    transformer: ClassVar[type[nnx.Module]]
    # Folders of the pipeline.
    parts: ClassVar[tuple[str, ...]] = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
    # In what the autoencoder works: None is what the transformer works in.
    vae_dtype: ClassVar[Any] = None
    # A family of videos sets both; one of pictures has a single frame and no rate.
    default_frames: ClassVar[int] = 1
    default_fps: ClassVar[int | None] = None
    # Of the transformers that take turns, which are of one shape: their folders.
    transformers: ClassVar[tuple[str, ...]] = ("transformer",)
    # What is guided away from where nothing is said.
    default_negative_prompt: ClassVar[str] = ""
    # How two predictions become one where there is a negative prompt.
    combine: ClassVar[Callable[..., jax.Array]] = staticmethod(extrapolate)
    # The grids that may grow, by the names that users give them, and how; the first is the default.
    expansions: ClassVar[Mapping[str, Expansion]] = {"latent": EXPANSION}
    # Kinds of noise levels to choose from, where there are several; the first is the default.
    noise_levels: ClassVar[tuple[str, ...]] = ()
    # Whether a size that does not fit is rounded down, with a notice, or refused.
    aligns_size: ClassVar[bool] = False
    # FLUX.1's, for a family of which nobody has published a spectrum: `spectrum` is then this very object,
    # until one is measured.
    borrowed_spectrum: ClassVar[Spectrum | None] = None
    # Of the transformer's tokens, their sides in latents.
    patch: ClassVar[tuple[int, ...]] = (2, 2)

    folder: Path | None
    config: Any
    scheduler: dict
    vae: VaeConfig
    spectrum: Spectrum
    text_tokens: int
    # Whether the layers' parameters stay in host memory, and come to the device when their turn is near.
    streamed: bool = False
    # Where the transformer's weights lie if not in the folder.
    transformer_weights_path: Path | None = None
    # In what the blocks' weights are kept and multiplied: a name in `models.quantized`, or as they are.
    quantize: str | None = None

    # What a family adds, beside `default_steps`, `default_guidance` and `default_size`, (height, width) in
    # pixels, and `sigmas(steps, tokens, flow_shift)`, σ `[steps + 1]` for `tokens` at full resolution.

    @property
    def texts(self) -> tuple[TextPart, ...]:
        """The text encoders, and what is asked of them."""
        raise NotImplementedError

    def encode(self, prompts: Sequence[str], encoders: Sequence[TextEncoder]) -> dict[str, np.ndarray]:
        """What the denoiser reads of each prompt, by the text encoders in the order of `texts`."""
        raise NotImplementedError

    def velocity(self, model: nnx.Module, latents: jax.Array, sigma: jax.Array, conditioning) -> jax.Array:
        """The velocity of `latents` at σ, a scalar; `conditioning` is as `encode` and `condition` make it."""
        raise NotImplementedError

    def abstract_conditioning(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of `condition`'s result: the same for every prompt."""
        raise NotImplementedError

    def forward_flops(self, tokens: int) -> float:
        """FLOPs of one forward of one sample: matrix products and attention, text included."""
        raise NotImplementedError

    def live_channels(self, tokens: int) -> float:
        """Channels of all tokens, in the model's dtype, that a layer of one forward of one sample holds at
        once beside its weights: as the compilers for GPUs lay it out (`bench/devices.py`).
        """
        raise NotImplementedError

    # What most do alike.

    def guided(self, guidance_scale: float) -> bool:
        """Whether there is a second pass with a negative prompt: as most official pipelines do, above 1."""
        return guidance_scale > 1

    def is_second(self, sigma: float) -> bool:
        """Whether a step that begins at noise level σ is the second transformer's, where there are two."""
        return False

    @property
    def default_guidance_2(self) -> float | None:
        """The guidance scale of the second transformer, where there is one."""
        return None

    def default_prompt_suffix(self, prompt: str) -> str:
        """What the model card puts after a prompt."""
        return ""

    def condition(self, encoded: dict[str, np.ndarray], guidance: float) -> dict[str, np.ndarray]:
        """What the denoiser wants for a batch of encoded prompts."""
        return encoded

    def open_autoencoder(self, dtype, residency: Residency) -> Autoencoder:
        """The VAE, whose files are checked, for a transformer that works in `dtype`."""
        return Autoencoder(self.folder / "vae", self.vae, self.vae_dtype or dtype, residency)

    # Geometry.

    def leading(self, frames: int) -> tuple[int, ...]:
        """The axes of latents between batch and grid."""
        return (self.vae.channels,)

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along an edge of a latent."""
        return self.vae.pixels_per_latent

    @property
    def pixel_multiple(self) -> int:
        """What height and width must divide by on every grid."""
        return self.pixels_per_latent * max(self.patch)

    def tokens(self, shape: tuple[int, ...]) -> int:
        """The transformer's tokens for latents of `shape`, (channels, …, h, w): one for each patch."""
        return prod(shape[1:]) // prod(self.patch)

    # The transformer.

    @property
    def weights(self) -> dict[str, str]:
        """The components beside the transformer that have weights, and the stem of these files' names."""
        return {text.part: TEXT_STEM for text in self.texts} | {"vae": STEM}

    def velocity_function(self, dtype) -> Callable[..., jax.Array]:
        """`velocity(parameters, latents, sigma, conditioning)`, pure."""
        graph, _ = nnx.split(self.abstract_transformer(dtype))

        def velocity(parameters, latents, sigma, conditioning):
            return self.velocity(nnx.merge(graph, parameters), latents, sigma, conditioning)

        return velocity

    def abstract_transformer(self, dtype) -> nnx.Module:
        """The transformer without weights; UsageError if there is none such."""
        try:
            transformer = self.transformer(self.config, dtype=dtype)
        except (TypeError, ValueError, ArithmeticError, MemoryError) as error:
            line = first_line(error)
            raise UsageError(f"no transformer can be made of transformer/config.json ({line})") from error
        if self.quantize:
            quantize(transformer, self.quantize)
        return transformer

    def abstract_parameters(self, dtype, target: Target | None = None) -> nnx.State:
        """Shapes and dtypes of the transformer's parameters, without allocating them; of those that are
        streamed, or that several devices have, where they lie for `target`.
        """
        state = nnx.state(self.abstract_transformer(dtype))
        spread = target is not None and target.mesh is not None
        if not (self.streamed or spread):
            return state
        target = target or Target()
        for path, parameter in nnx.to_flat_state(state):
            # Of a layer, which has a number.
            host = self.streamed and any(isinstance(part, int) for part in path)
            if host or spread:
                one = parameter.get_value()
                place = target.weight(one.shape, **({"memory_kind": HOST} if host else {}))
                parameter.set_value(jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=place))
        return state


def check_parts(folder: Path, parts: tuple[str, ...], transformer: Mapping | None = None) -> None:
    """UsageError if `folder` lacks some of `parts`, among them a `transformer` unless its configuration is
    given.
    """
    needed = [part for part in parts if part != "transformer" or transformer is None]
    missing = [part for part in needed if not (folder / part).is_dir()]
    if missing:
        raise UsageError(f"{folder} lacks {', '.join(missing)}; the folder is incomplete")


def read_spectrum(folder: Path, default: Spectrum) -> Spectrum:
    """The spectrum measured for this very checkpoint, where the folder holds one."""
    path = folder / "spectrum.json"
    return Spectrum.from_file(path) if path.exists() else default


def is_named(folder: Path, pattern: str, variant: str) -> bool:
    """Whether the checkpoint in `folder` is `variant`, of which only its name tells: the regular expression
    `pattern` is found in the folder's name, in that of the repository of which the hub's cache has it, or in
    what the pipeline was saved from. If so, a notice says it.
    """
    folders = [folder.absolute(), folder.resolve()]
    names = [path.parent.parent.name if path.parent.name == "snapshots" else path.name for path in folders]
    names.append(str(read_json(folder / "model_index.json").get("_name_or_path", "")))
    found = any(re.search(pattern, name.rpartition("/")[2].lower()) for name in names)
    if found:
        log.warning("by its name this is %s: what is not asked for is as on its model card", variant)
    return found
