"""A transformer's weights from one file or a folder of shards, in any layout and with any prefix. They are
given in diffusers' layout.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .checkpoint import PICKLES, STEM, Checkpoint, file_names, weight_entry
from .dequantised import Dequantised
from .errors import UsageError
from .gguf_file import MAGIC, GgufCheckpoint
from .identify import BESIDE, Transformer, find_transformer, kind_of, refusal, three
from .layout import Target
from .layouts import LAYOUTS, TITLES, as_published
from .table import Rule

CONFIG = "the pipeline's transformer/config.json"
# What to say of a file that holds something else.
ELSEWHERE = {
    "lora": "it is a LoRA, which only changes a transformer; give it as lora_path",
    "vae": "it is a VAE",
    "text_encoder": "it is a text encoder",
}


def open_file(path: Path):
    """The tensors of a safetensors or GGUF file, or of the shards of a folder or an index, dequantised.

    Raises UsageError if there are none. Pickles are recognised but never loaded.
    """
    if path.is_dir():
        names = file_names(path)
        entry = weight_entry(names) or weight_entry(names, "model") or _only(path, names)
        path = path / entry
    if not path.is_file():
        raise UsageError(f"{path} does not exist or is not a file; give a file of weights")
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from None
    if head[:4] == MAGIC:
        return Dequantised(GgufCheckpoint(path))
    if path.suffix.lower() in PICKLES or _is_pickle(head):
        raise UsageError(
            f"{path} is a pickle, and pickles are never loaded, since they may run anything; "
            "give safetensors or GGUF"
        )
    return Dequantised(Checkpoint(path))


def open_transformer(path: Path, family: str, rules: Sequence[Rule] = ()) -> "Relaid":
    """The transformer in `path`, for a pipeline of `family`, such as "flux1".

    `rules` are the family's conversion table; they identify a family without other layouts. Raises UsageError
    unless the file holds a transformer of this family. Missing weights are found later, by `loader.match`.
    """
    tensors = open_file(path)
    found = find_transformer(tensors.keys(), {family: (as_published(rules),)} | LAYOUTS)
    if found is None:
        raise UsageError(f"{path} holds no transformer that jaxspd knows: {otherwise(tensors.keys())}")
    if found.family != family:
        raise UsageError(
            f"{path} is a transformer of {TITLES.get(found.family, found.family)}, the pipeline is "
            f"{TITLES.get(family, family)}; give a file of the pipeline's own family"
        )
    tensors = tensors.without(BESIDE)
    tensors.check_floats()
    relaid = Relaid(tensors, found)
    if reason := refusal(found, relaid.shapes()):
        raise UsageError(f"{path} cannot be used: {reason}")
    return relaid


def replaced_transformer(family) -> "Relaid | None":
    """The transformer that replaces the one in the folder of `family`; None if there is none."""
    path = family.transformer_weights_path
    return path and open_transformer(path, family.name, family.rules)


def otherwise(keys: set[str]) -> str:
    """What tensors that form no transformer are, for a message."""
    if not keys:
        return "it has no tensors"
    return ELSEWHERE.get(kind_of(keys) or "", f"its tensors are {three(keys)}")


class Relaid:
    """The tensors of a transformer in diffusers' layout. Reads like a `Checkpoint`."""

    config = CONFIG

    def __init__(self, tensors: Dequantised, found: Transformer):
        """Raises UsageError if two stored tensors are the same tensor, or if one cannot be cut."""
        self.folder = tensors.folder
        self._tensors = tensors
        self._sources: dict[str, tuple[str, Target]] = {}
        for key, targets in found.targets.items():
            for target in targets:
                if target.key in self._sources:
                    twice = self._sources[target.key][0]
                    raise UsageError(f"{self.folder}: {twice} and {key} are two names of one tensor")
                self._sources[target.key] = key, target
                self.shape(target.key)

    def keys(self) -> set[str]:
        return set(self._sources)

    def shape(self, key: str) -> tuple[int, ...]:
        stored, target = self._sources[key]
        try:
            return target.shape(self._tensors.shape(stored))
        except UsageError as error:
            raise UsageError(f"{self.folder}: {stored} cannot be cut: {error}") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {key: self.shape(key) for key in self._sources}

    def dtype(self, key: str) -> str:
        return self._tensors.dtype(self._sources[key][0])

    def check_floats(self) -> None:
        self._tensors.check_floats()

    def read(self, key: str) -> np.ndarray:
        """The tensor. Only its rows of the stored tensor are read and dequantised."""
        stored, target = self._sources[key]
        if target.whole:
            return self._tensors.read(stored)
        parts = [self._tensors.read(stored, rows) for rows in target.rows(self._tensors.shape(stored)[0])]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _only(folder: Path, names: list[str]) -> str:
    """The only file of weights, or index of them, in a folder. Raises UsageError if there is none or
    several.
    """
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    files = indexes or [name for name in names if Path(name).suffix.lower() in (".safetensors", ".gguf")]
    if len(files) == 1:
        return files[0]
    pickles = [name for name in names if Path(name).suffix.lower() in PICKLES]
    if not files and pickles:
        raise UsageError(f"{folder} holds only {three(pickles)}, and pickles are never loaded")
    raise UsageError(f"{folder} holds {len(files)} files of weights and no {STEM}.safetensors; give one file")


def _is_pickle(head: bytes) -> bool:
    """Whether a file with this beginning is a pickle or PyTorch's archive of pickles. A safetensors file
    begins with the length of its header, which is small.
    """
    long = int.from_bytes(head, "little") > 2**32
    return head[:4] == b"PK\3\4" or (long and head[:1] == b"\x80" and head[1:2] <= b"\5")
