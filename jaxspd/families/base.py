"""What every family keeps of a checkpoint, and does alike."""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from jaxspd.convert.checkpoint import Checkpoint, read_json
from jaxspd.convert.table import Rule
from jaxspd.errors import UsageError, first_line
from jaxspd.families.checks import Autoencoder, TextPart, check_tokenizer
from jaxspd.families.configs import read_fields, wrong
from jaxspd.models.layers import abstract
from jaxspd.runtime.layerwise import HOST
from jaxspd.sampling.guidance import extrapolate
from jaxspd.spectral.expansion import EXPANSION, Expansion
from jaxspd.spectral.spectrum import Spectrum

log = logging.getLogger("jaxspd")

# Of FLUX.1's VAE; fitted on 105k images by the method's authors (arXiv 2605.18736).
FLUX1_SPECTRUM = Spectrum(amplitude=203.615097, exponent=1.915461)


@dataclass(frozen=True)
class BaseFamily:
    """A checkpoint's configuration, without weights.

    A family adds its defaults, geometry, σ schedule, denoiser, text encoders and decoder. Latents are
    `[B, *leading, h, w]`, leading being (channels,) for pictures and (channels, frames) for videos.
    """

    name: ClassVar[str]  # as in `jaxspd plan --family`
    title: ClassVar[str]
    rules: ClassVar[tuple[Rule, ...]]
    transformer: ClassVar[type[nnx.Module]]
    # Folders of the pipeline, and the stem of the weight files in those that PyTorch loads.
    parts: ClassVar[tuple[str, ...]]
    weights: ClassVar[Mapping[str, str]]
    # A family of videos sets both; one of pictures has a single frame and no rate.
    default_frames: ClassVar[int] = 1
    default_fps: ClassVar[int | None] = None
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

    folder: Path | None
    config: Any
    scheduler: dict
    vae: dict
    spectrum: Spectrum
    text_tokens: int
    # Whether the layers' parameters stay in host memory, and come to the device when their turn is near.
    streamed: bool = False

    # What PyTorch runs: nothing, for a family that brings its own.
    texts: ClassVar[tuple[TextPart, ...]] = ()
    autoencoder: ClassVar[Autoencoder | None] = None

    def check_weights(self) -> None:
        """UsageError if the weights of an encoder or the VAE are missing, truncated, pickled or quantised, or
        a tokenizer's vocabulary is missing or damaged: better now than when the latents are ready to be
        decoded.
        """
        checkpoints = {part: Checkpoint(self.folder / part, stem) for part, stem in self.weights.items()}
        for checkpoint in checkpoints.values():
            checkpoint.check_floats()
        for text in self.texts:
            check_tokenizer(self.folder / text.tokenizer, checkpoints[text.part])

    def tokens(self, shape: tuple[int, ...]) -> int:
        """The transformer's tokens for latents of `shape`, (channels, …, h, w): one for each patch."""
        return prod(shape[1:]) // self.latents_per_token

    def guided(self, guidance_scale: float) -> bool:
        """Whether there is a second pass with a negative prompt: as most official pipelines do, above 1."""
        return guidance_scale > 1

    def default_prompt_suffix(self, prompt: str) -> str:
        """What the model card puts after a prompt."""
        return ""

    def condition(self, encoded: dict[str, np.ndarray], guidance: float) -> dict[str, np.ndarray]:
        """What the denoiser wants for a batch of encoded prompts."""
        return encoded

    def abstract_transformer(self, dtype) -> nnx.Module:
        """The transformer with shapes and dtypes in place of arrays; UsageError if there is none such."""
        try:
            return abstract(lambda: self.transformer(self.config, dtype=dtype, rngs=nnx.Rngs(0)))
        except (TypeError, ValueError, ArithmeticError, MemoryError) as error:
            line = first_line(error)
            raise UsageError(f"no transformer can be made of transformer/config.json ({line})") from error

    def abstract_parameters(self, dtype) -> nnx.State:
        """Shapes and dtypes of the transformer's parameters, without allocating them; of those that are
        streamed, where they lie.
        """
        state = nnx.state(self.abstract_transformer(dtype))
        if not self.streamed:
            return state
        host = SingleDeviceSharding(jax.devices()[0], memory_kind=HOST)
        for path, parameter in nnx.to_flat_state(state):
            if any(isinstance(part, int) for part in path):  # of a layer, which has a number
                one = parameter.get_value()
                parameter.set_value(jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=host))
        return state


def check_parts(folder: Path, parts: tuple[str, ...]) -> None:
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        raise UsageError(f"{folder} lacks {', '.join(missing)}; the folder is incomplete")


def read_transformer_config(folder: Path, config_class: type) -> Any:
    """`config_class` with those of its fields that `transformer/config.json` holds; UsageError for a value of
    another type, or a number that is not positive.
    """
    path = folder / "transformer" / "config.json"
    config = read_fields(path, config_class)
    for name, value in vars(config).items():
        if isinstance(value, float) and value <= 0:
            raise wrong(path, name, value, "a number above 0")
    return config


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
