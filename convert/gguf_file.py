"""Weights in GGUF files, made float32 tensor by tensor with the `gguf` package.

A tensor's name is the one that it had in the file that it was made of, its axes are written the other way
round, and its quantised values come in blocks along the last axis, so that rows can be read alone.
"""

import mmap
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .checkpoint import Checkpoint, changed
from .errors import UsageError, first_line

MAGIC = b"GGUF"
# Stored as they are, by their names in GGUF.
FLOATS = {"F32", "F16", "BF16"}
# Where the shape of a tensor is kept that was given another, for its axes or its blocks.
SHAPE = "comfy.gguf.orig_shape."


class Stored(NamedTuple):
    """A tensor: its own shape, how its values are packed (F16, Q4_K, …), and what the file has of it, rows of
    `packed`'s shape from `start` on, in bytes from where the file begins.
    """

    shape: tuple[int, ...]
    kind: str
    packed: tuple[int, ...]
    unit: np.dtype
    start: int


class GgufCheckpoint:
    """The tensors of a GGUF file, as `Checkpoint` gives those of safetensors."""

    config = Checkpoint.config

    def __init__(self, path: Path):
        """UsageError if the file is truncated, damaged or no GGUF."""
        from gguf import GGUFReader  # here, since it takes a while and few files need it

        class Reader(GGUFReader):
            """Refuses what lies beyond the file's end, of which the package makes empty arrays, for ever."""

            def _get(self, offset, dtype, count=1, override_order=None):
                array = super()._get(offset, dtype, count, override_order)
                if len(array) != count:
                    raise ValueError("it ends too early")
                return array

        self.folder, self.metadata = path, {}
        try:
            with np.errstate(all="ignore"):
                reader = Reader(path)
                self._tensors = {tensor.name: _stored(reader, tensor) for tensor in reader.tensors}
        except Exception as error:  # the package has no exception of its own for a damaged file
            raise UsageError(
                f"{path} is truncated or no GGUF file ({first_line(error)}); download it again"
            ) from None

    def keys(self) -> set[str]:
        return set(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensors[key].shape

    def dtype(self, key: str) -> str:
        """What `read` gives, as safetensors names it: quantised values become F32."""
        kind = self._tensors[key].kind
        return kind if kind in FLOATS else "F32"

    def stored_dtype(self, key: str) -> str:
        """As GGUF names it: F16, Q8_0, Q4_K, …"""
        return self._tensors[key].kind

    def check_floats(self) -> None:
        """UsageError if there are values that the package cannot make floats of."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        for kind in sorted({stored.kind for stored in self._tensors.values()}):
            number = GGMLQuantizationType[kind]
            try:
                dequantize(np.zeros((1, GGML_QUANT_SIZES[number][1]), np.uint8), number)
            except NotImplementedError:
                raise UsageError(
                    f"{self.folder} stores weights as {kind}, which cannot be read; give one such as Q8_0"
                ) from None

    def read(self, key: str, rows: slice | None = None) -> np.ndarray:
        """The tensor, or some `rows` of it: float16 as stored, everything else float32.

        UsageError if the file has changed.
        """
        from gguf import GGMLQuantizationType, dequantize

        shape, kind, packed, unit, start = self._tensors[key]
        try:
            with self.folder.open("rb") as file:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            array = np.ndarray(packed, unit, memory, start)
        except (OSError, ValueError, TypeError) as error:  # gone, empty, cut
            raise changed(self.folder, error) from None
        # Rows are alone in their blocks, unless the file has other rows than the tensor.
        apart = packed[:1] == shape[:1]
        if rows is not None and apart:
            array = array[rows]
        if kind not in ("F32", "F16"):
            array = dequantize(array, GGMLQuantizationType[kind])
        array = array.reshape((len(array), *shape[1:]) if apart and shape else shape)
        return array if rows is None or apart else array[rows]


def _stored(reader, tensor) -> Stored:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if field := reader.get_field(SHAPE + tensor.name):
        own = tuple(int(size) for size in field.contents())
        if prod(own) != prod(shape):
            raise ValueError(f"{tensor.name} has two shapes")
        shape = own
    data = tensor.data
    return Stored(shape, tensor.tensor_type.name, data.shape, data.dtype, int(tensor.data_offset))
