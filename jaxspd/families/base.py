"""The base class of all families, and what they share in reading a checkpoint."""

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

# The spectrum of FLUX.1's VAE, which the method's authors fitted on 105k images (arXiv 2605.18736).
FLUX1_SPECTRUM = Spectrum(amplitude=203.615097, exponent=1.915461)


@dataclass(frozen=True)
class BaseFamily:
    """A recipe: how a pipeline's components make pictures or videos. It knows their configurations only.

    A family adds its defaults, its σ schedule, its denoiser and its text encoding. Latents are `[B, *leading,
    h, w]`, where leading is (channels,) for pictures and (channels, frames) for videos. Without a folder a
    family is its published checkpoint, for planning and counting.
    """

    name: ClassVar[str]  # as in `jaxspd plan --family`
    title: ClassVar[str]
    rules: ClassVar[tuple[Rule, ...]]
    transformer: ClassVar[Any]  # a class of `models`
    # The pipeline's folders.
    parts: ClassVar[tuple[str, ...]] = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
    # The autoencoder's dtype, or None for the transformer's.
    vae_dtype: ClassVar[Any] = None
    # A video family sets both. A picture has a single frame and no frame rate.
    default_frames: ClassVar[int] = 1
    default_fps: ClassVar[int | None] = None
    # The folders of the transformers that take turns. These have the same configuration.
    transformers: ClassVar[tuple[str, ...]] = ("transformer",)
    # The negative prompt if the user gives none.
    default_negative_prompt: ClassVar[str] = ""
    # How the predictions for the prompt and the negative prompt become one.
    combine: ClassVar[Callable[..., jax.Array]] = staticmethod(extrapolate)
    # The grids that may grow, by the names that users choose them by, and how. The first is the default.
    expansions: ClassVar[Mapping[str, Expansion]] = {"latent": EXPANSION}
    # The kinds of noise levels to choose from, if there are several. The first is the default.
    noise_levels: ClassVar[tuple[str, ...]] = ()
    # Whether a size that does not fit is rounded down, with a notice, or else refused.
    aligns_size: ClassVar[bool] = False
    # FLUX.1's spectrum, for a family without a published one. `spectrum` is then this very object, until a
    # spectrum is measured.
    borrowed_spectrum: ClassVar[Spectrum | None] = None
    # The sides of a transformer's token, in latents.
    patch: ClassVar[tuple[int, ...]] = (2, 2)

    folder: Path | None
    config: Any
    scheduler: dict
    vae: VaeConfig
    spectrum: Spectrum
    text_tokens: int
    # Whether the layers' parameters stay in host memory, and come to the device when their turn is near.
    streamed: bool = False
    # Where the transformer's weights are if they are not in the folder.
    transformer_weights_path: Path | None = None
    # The format in which the blocks' weights are kept and multiplied: a name in `models.quantized`, or None
    # for the weights as they are.
    quantize: str | None = None

    # A family adds the members below. It also adds `default_steps`, `default_guidance`, `default_size`
    # (height, width) in pixels, and `sigmas(steps, tokens, flow_shift)`, σ `[steps + 1]` for `tokens` at full
    # resolution.

    @property
    def texts(self) -> tuple[TextPart, ...]:
        """The text encoders, and what the family needs of each."""
        raise NotImplementedError

    def encode(self, prompts: Sequence[str], encoders: Sequence[TextEncoder]) -> dict[str, np.ndarray]:
        """The encoded prompts, arrays `[B, …]`, for the denoiser. `encoders` are in the order of `texts`."""
        raise NotImplementedError

    def velocity(self, model: nnx.Module, latents: jax.Array, sigma: jax.Array, conditioning) -> jax.Array:
        """The velocity of `latents` `[B, *leading, h, w]` at the scalar σ, in the same shape.

        `conditioning` is the result of `condition`.
        """
        raise NotImplementedError

    def abstract_conditioning(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of `condition`'s result, which are the same for every prompt."""
        raise NotImplementedError

    def forward_flops(self, tokens: int) -> float:
        """FLOPs of one forward of one sample: matrix products and attention, over image and text tokens."""
        raise NotImplementedError

    def live_channels(self, tokens: int) -> float:
        """How many values, in the model's dtype, a layer holds at once for one sample, beside its weights.

        The number is channels summed over all tokens, as the compilers for GPUs lay out a layer
        (`bench/devices.py`).
        """
        raise NotImplementedError

    # What most families have in common.

    def guided(self, guidance_scale: float) -> bool:
        """Whether there is a second pass with a negative prompt: above 1, as in most official pipelines."""
        return guidance_scale > 1

    def is_second(self, sigma: float) -> bool:
        """Whether the second of two transformers takes a step that begins at noise level σ."""
        return False

    @property
    def default_guidance_2(self) -> float | None:
        """The guidance scale of the second transformer, or None if there is only one."""
        return None

    def default_prompt_suffix(self, prompt: str) -> str:
        """The text that the model card puts after a prompt."""
        return ""

    def condition(self, encoded: dict[str, np.ndarray], guidance: float) -> dict[str, np.ndarray]:
        """The denoiser's conditioning for a batch of prompts, as `encode` encoded them."""
        return encoded

    def open_autoencoder(self, dtype, residency: Residency) -> Autoencoder:
        """The autoencoder, with its files checked, for a transformer that works in `dtype`."""
        assert self.folder is not None, "a family without a folder has no weights"
        return Autoencoder(self.folder / "vae", self.vae, self.vae_dtype or dtype, residency)

    # Geometry.

    def leading(self, frames: int) -> tuple[int, ...]:
        """The sizes of the latents' axes between batch and grid."""
        return (self.vae.channels,)

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along an edge of a latent."""
        return self.vae.pixels_per_latent

    @property
    def pixel_multiple(self) -> int:
        """The number of pixels that must divide the height and the width of every grid."""
        return self.pixels_per_latent * max(self.patch)

    def tokens(self, shape: tuple[int, ...]) -> int:
        """The number of tokens for latents of `shape` (channels, …, h, w): one for each patch."""
        return prod(shape[1:]) // prod(self.patch)

    # The transformer.

    @property
    def weights(self) -> dict[str, str]:
        """The components beside the transformer that have weights -> the stem of their files' names."""
        return {text.part: TEXT_STEM for text in self.texts} | {"vae": STEM}

    def velocity_function(self, dtype) -> Callable[..., jax.Array]:
        """A pure function `velocity(parameters, latents, sigma, conditioning)`."""
        graph, _ = nnx.split(self.abstract_transformer(dtype))

        def velocity(parameters, latents, sigma, conditioning):
            return self.velocity(nnx.merge(graph, parameters), latents, sigma, conditioning)

        return velocity

    def abstract_transformer(self, dtype) -> nnx.Module:
        """The transformer without weights. Raises UsageError if its configuration is impossible."""
        try:
            transformer = self.transformer(self.config, dtype=dtype)
        except (TypeError, ValueError, ArithmeticError, MemoryError) as error:
            line = first_line(error)
            raise UsageError(f"no transformer can be made of transformer/config.json ({line})") from error
        if self.quantize:
            quantize(transformer, self.quantize)
        return transformer

    def abstract_parameters(self, dtype, target: Target | None = None) -> nnx.State:
        """Shapes and dtypes of the transformer's parameters, without allocating them.

        Streamed parameters, and all parameters over several devices, also have their sharding on `target`.
        """
        state = nnx.state(self.abstract_transformer(dtype))
        spread = target is not None and target.mesh is not None
        if not (self.streamed or spread):
            return state
        target = target or Target()
        for path, parameter in nnx.to_flat_state(state):
            # A layer's parameters have its number in their path.
            host = self.streamed and any(isinstance(part, int) for part in path)
            if host or spread:
                one = parameter.get_value()
                place = target.weight(one.shape, **({"memory_kind": HOST} if host else {}))
                parameter.set_value(jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=place))
        return state


def check_parts(folder: Path, parts: tuple[str, ...], transformer: Mapping | None = None) -> None:
    """Raises UsageError if `folder` lacks one of `parts`.

    If the configuration `transformer` is given, the folder of that name is not needed.
    """
    needed = [part for part in parts if part != "transformer" or transformer is None]
    missing = [part for part in needed if not (folder / part).is_dir()]
    if missing:
        raise UsageError(f"{folder} lacks {', '.join(missing)}; the folder is incomplete")


def read_spectrum(folder: Path, default: Spectrum) -> Spectrum:
    """The spectrum in `folder`'s spectrum.json, measured for this checkpoint, or else `default`."""
    path = folder / "spectrum.json"
    return Spectrum.from_file(path) if path.exists() else default


def is_named(folder: Path, pattern: str, variant: str) -> bool:
    """Whether the checkpoint in `folder` is `variant`, judged by its name. If so, a notice is logged.

    The regular expression `pattern` is searched in the folder's name, in the repository's name if the folder
    is in the hub's cache, and in the name of what the pipeline was saved from.
    """
    folders = [folder.absolute(), folder.resolve()]
    names = [path.parent.parent.name if path.parent.name == "snapshots" else path.name for path in folders]
    names.append(str(read_json(folder / "model_index.json").get("_name_or_path", "")))
    found = any(re.search(pattern, name.rpartition("/")[2].lower()) for name in names)
    if found:
        log.warning("by its name this is %s: the defaults are those of its model card", variant)
    return found
