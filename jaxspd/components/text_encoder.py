"""A text encoder of a pipeline: from texts to what its denoiser reads of them."""

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

# The stem of weight files' names in transformers' layout.
STEM = "model"
# Where every model has its table of tokens.
TABLE = "embedding.embedding"


@dataclass(frozen=True)
class TextPart:
    """What a family asks of one of its text encoders.

    `kind` is a key of `KINDS`. The denoiser reads states of `width` channels, of `tokens` tokens; `states`
    says which of a decoder's, as `models.text.decoder` counts them. `chat` says whether the tokenizer needs a
    template of conversations. `part` and `tokenizer` are folders of the pipeline. `published` is the
    configuration of the encoder that the official checkpoint has, to count with where there is no folder.
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
    """How to run the model in a folder: to make it, to name its tensors, and to read `[B, …]` of embedded
    tokens `[B, T, D]`, their ids and mask; and what its configuration says of its size.
    """

    make: Callable[..., nnx.Module]
    names: Callable[[set[str]], Mapping[str, str]]
    rules: Callable[[set[str]], Sequence[Rule]]
    read: Callable[..., jax.Array]
    width: int
    vocabulary: int
    positions: int | None = None


def clip(config: ClipTextConfig, states: Sequence[int]) -> Architecture:
    """CLIP's text model, of which one vector a text is read: `[B, D]`."""
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
    """The encoder of T5 or UMT5, of which the last states are read: `[B, T, D]`."""
    return Architecture(
        partial(T5Encoder, config),
        text_t5.names,
        text_t5.rules_for,
        lambda model, x, ids, mask: model.encode(x, mask),
        config.d_model,
        config.vocab_size,
    )


def decoder(config: DecoderConfig, states: Sequence[int]) -> Architecture:
    """A decoder-only language model, of which `states` are read, side by side: `[B, T, D · states]`."""
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
# The configuration that a folder holds, and the architecture that it is of.
KINDS = {"clip": (ClipTextConfig, clip), "t5": (T5Config, t5), "decoder": (DecoderConfig, decoder)}


def without_table(architecture: Architecture, dtype) -> nnx.Module:
    """The model without weights, and without its table of tokens: a few rows of it are needed, which the file
    itself gives.
    """
    model = architecture.make(dtype=dtype)
    model.embedding = None
    return model


def encoding(architecture: Architecture, graph: nnx.GraphDef) -> Callable[..., jax.Array]:
    """`encode(parameters, embedded, ids, mask)`, pure and in float32, of a model that splits into `graph`."""

    def encode(parameters, embedded, ids, mask):
        return architecture.read(nnx.merge(graph, parameters), embedded, ids, mask).astype(jnp.float32)

    return encode


class TextEncoder:
    """One text encoder of the pipeline in `folder`, with its tokenizer. The weights of its layers come from
    their file when they are needed, or stay in memory: `residency` decides. `merge` puts LoRAs into the
    tensors of its files.

    UsageError if the folder's files are damaged, or do not fit one another or what is `asked`. Nothing is
    read of the weights before a text is encoded.
    """

    def __init__(
        self,
        folder: Path,
        asked: TextPart,
        dtype,
        residency: Residency,
        merge: Callable[[Any], Any] = lambda tensors: tensors,
    ):
        self.folder, self.dtype, self._target = folder / asked.part, dtype, residency.target
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
                f"{self.folder} reads {most} tokens, and is given {asked.tokens}; use another text encoder"
            )

    def __call__(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """What the denoiser reads of token `ids` `[B, T]`, float32; `mask` `[B, T]` is nonzero where a text
        is no padding, and without one padding is seen too. UsageError unless all of it is finite.
        """
        count = len(ids)
        # A program is for so many texts, and there are not to be many programs: 1, 2, 4, 8.
        rows = np.arange(1 << (count - 1).bit_length()) % count
        ids, mask = (None if array is None else np.asarray(array, np.int32)[rows] for array in (ids, mask))
        embedded = self._checkpoint.rows(self._table, ids).astype(self.dtype)
        values = np.asarray(self._program(embedded, ids, mask)(self.weights(), embedded, ids, mask))[:count]
        if not np.isfinite(values).all():
            raise UsageError(
                f"{self.folder} makes NaN or infinity of the prompt; its weights are damaged, download it "
                "again"
            )
        return values

    def _program(self, *inputs: np.ndarray | None) -> Layerwise:
        """What runs on `inputs` such as these: compiled once."""
        key = tuple(None if array is None else array.shape for array in inputs)
        if key not in self._programs:
            self._programs[key] = Layerwise(self._encode, self.weights.stored, *inputs, target=self._target)
        return self._programs[key]
