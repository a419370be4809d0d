"""A text encoder of a pipeline, from token ids to the array that the denoiser reads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspd.components.tokenizer import check_vocabulary, open_tokenizer
from jaxspd.convert import text_clip, text_decoder, text_t5
from jaxspd.convert.checkpoint import Checkpoint
from jaxspd.convert.loader import flat_parameters, match, stored_parameters
from jaxspd.convert.table import Rule
from jaxspd.convert.text_names import Renamed
from jaxspd.errors import UsageError
from jaxspd.models.text.clip import ClipTextConfig, ClipTextModel
from jaxspd.models.text.decoder import Decoder, resolve
from jaxspd.models.text.decoder_config import DecoderConfig
from jaxspd.models.text.t5 import T5Config, T5Encoder
from jaxspd.runtime.layerwise import Layerwise
from jaxspd.runtime.residency import Residency

# The stem of the names of weight files, in transformers' layout.
STEM = "model"
# The path of the table of tokens in every model.
TABLE = "embedding.embedding"


@dataclass(frozen=True)
class TextPart:
    """What a family expects of one of its text encoders.

    `kind` is a key of `KINDS`. The denoiser reads `tokens` tokens of `width` channels. `states` are the
    hidden states that it reads of a decoder, numbered as in `models.text.decoder`. `chat` says whether the
    tokenizer needs a chat template. `part` and `tokenizer` are folders of the pipeline. `published` is the
    configuration of the official checkpoint's encoder, used for estimates without a folder.
    """

    kind: str
    width: float
    tokens: int
    states: tuple[int, ...] = (-1,)
    chat: bool = False
    part: str = "text_encoder"
    tokenizer: str = "tokenizer"
    published: "TextConfig | None" = None


class Architecture(NamedTuple):
    """How to run the model in a folder.

    `make(dtype=...)` makes it without weights. `names` and `rules` find its tensors among a file's keys.
    `read(model, embedded, ids, mask)` gives what the denoiser reads, `[B, …]`, of embedded tokens
    `[B, T, D]`. The other fields are sizes from its configuration.
    """

    make: Callable[..., nnx.Module]
    names: Callable[[set[str]], Mapping[str, str]]
    rules: Callable[[set[str]], Sequence[Rule]]
    read: Callable[..., jax.Array]
    width: int
    vocabulary: int
    positions: int | None = None


def clip(config: ClipTextConfig, states: Sequence[int]) -> Architecture:
    """CLIP's text model, from which one vector per text is read: `[B, D]`."""
    return Architecture(
        partial(ClipTextModel, config),
        text_clip.names,
        lambda keys: text_clip.RULES,
        lambda model, x, ids, mask: model.pool(model.encode(x, mask), ids),
        config.hidden_size,
        config.vocab_size,
        config.max_position_embeddings,
    )


def t5(config: T5Config, states: Sequence[int]) -> Architecture:
    """The encoder of T5 or UMT5, from which the last hidden states are read: `[B, T, D]`."""
    return Architecture(
        partial(T5Encoder, config),
        text_t5.names,
        text_t5.rules_for,
        lambda model, x, ids, mask: model.encode(x, mask),
        config.d_model,
        config.vocab_size,
    )


def decoder(config: DecoderConfig, states: Sequence[int]) -> Architecture:
    """A decoder-only language model, from which the hidden states `states` are read, concatenated:
    `[B, T, D · states]`.
    """
    layers = config.num_hidden_layers
    return Architecture(
        partial(Decoder, config, states),
        partial(text_decoder.names, built=max(resolve(states, layers)), layers=layers),
        lambda keys: text_decoder.RULES,
        lambda model, x, ids, mask: jnp.concatenate(model.encode(x, mask), axis=-1),
        config.hidden_size,
        config.vocab_size,
    )


TextConfig = ClipTextConfig | T5Config | DecoderConfig
# For each kind of text encoder, the class of its configuration and its architecture.
KINDS: dict[str, tuple[Any, Callable[..., Architecture]]] = {
    "clip": (ClipTextConfig, clip),
    "t5": (T5Config, t5),
    "decoder": (DecoderConfig, decoder),
}


def without_table(architecture: Architecture, dtype) -> nnx.Module:
    """The model without weights and without its table of tokens. The few rows that a text needs are read from
    the file.
    """
    model: Any = architecture.make(dtype=dtype)
    model.embedding = None
    return model


def encoding(architecture: Architecture, graph: nnx.GraphDef) -> Callable[..., jax.Array]:
    """A pure function `encode(parameters, embedded, ids, mask)`, whose result is float32, for a model with
    the structure `graph`.
    """

    def encode(parameters, embedded, ids, mask):
        return architecture.read(nnx.merge(graph, parameters), embedded, ids, mask).astype(jnp.float32)

    return encode


class TextEncoder:
    """One text encoder of the pipeline in `folder`, with its tokenizer.

    Its layers' weights are read from their file when they are needed, or stay in memory: `residency` decides.
    `merge` merges LoRAs into the tensors of its files.

    Raises UsageError if the folder's files are damaged, do not fit each other or are not what is `asked` for.
    No weights are read before a text is encoded.
    """

    def __init__(
        self,
        folder: Path,
        asked: TextPart,
        dtype,
        residency: Residency,
        merge: Callable[[Any], Any] = lambda tensors: tensors,
    ):
        self.folder, self.dtype, self._target = folder / asked.part, dtype, residency.target.single
        stored = Checkpoint(self.folder, STEM)
        stored.check_floats()
        stored = merge(stored)
        config_class, kind = KINDS[asked.kind]
        architecture = kind(config_class.from_folder(self.folder), asked.states)
        self._check(architecture, asked)
        self.tokenizer = open_tokenizer(folder / asked.tokenizer, chat=asked.chat)
        check_vocabulary(self.tokenizer, architecture.vocabulary, self.folder)
        self._checkpoint = Renamed(stored, architecture.names)
        keys = match(
            self._checkpoint,
            flat_parameters(nnx.state(architecture.make(dtype=dtype))),
            architecture.rules(self._checkpoint.keys()),
        )
        self._table = keys[TABLE]
        graph, shapes = nnx.split(without_table(architecture, dtype))
        self._encode = encoding(architecture, graph)
        self.weights = residency.weights(
            asked.part, stored_parameters(self._checkpoint, shapes, keys), streamed=True
        )
        self._programs: dict[Any, Layerwise] = {}

    def _check(self, architecture: Architecture, asked: TextPart) -> None:
        if architecture.width != asked.width:
            raise UsageError(
                f"{self.folder} encodes text in {architecture.width} channels, and the transformer reads "
                f"{asked.width:g}; they do not belong together"
            )
        if (most := architecture.positions or asked.tokens) < asked.tokens:
            raise UsageError(
                f"{self.folder} reads {most} tokens, but is given {asked.tokens}; use another text encoder"
            )

    def __call__(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """The array that the denoiser reads, float32, for token `ids` `[B, T]`. `mask` `[B, T]` is zero at
        padding; without a mask, tokens see padding too. Raises UsageError unless all numbers are finite.
        """
        count = len(ids)
        # Each number of texts needs its own program, so it is rounded up to 1, 2, 4, 8, ….
        rows = np.arange(1 << (count - 1).bit_length()) % count
        ids = np.asarray(ids, np.int32)[rows]
        mask = None if mask is None else np.asarray(mask, np.int32)[rows]
        embedded = self._checkpoint.rows(self._table, ids).astype(self.dtype)
        values = np.asarray(self._program(embedded, ids, mask)(self.weights(), embedded, ids, mask))[:count]
        if not np.isfinite(values).all():
            raise UsageError(
                f"{self.folder} makes NaN or infinity of the prompt; its weights are damaged, download it "
                "again"
            )
        return values

    def _program(self, *inputs: np.ndarray | None) -> Layerwise:
        """The program for inputs of these shapes, compiled once."""
        key = tuple(None if array is None else array.shape for array in inputs)
        if key not in self._programs:
            self._programs[key] = Layerwise(self._encode, self.weights.stored, *inputs, target=self._target)
        return self._programs[key]
