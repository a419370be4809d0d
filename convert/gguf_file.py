"""Weights in GGUF files, read as float32 one tensor at a time with the `gguf` package.

A tensor keeps the name that it had in the file from which the GGUF file was made. Its axes are in reverse
order. Quantised values are in blocks along the last axis, so rows can be read separately.
"""

import mmap
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .checkpoint import Checkpoint, changed
from .errors import UsageError, first_line

MAGIC = b"GGUF"
# GGUF's names of the types that are not quantised.
FLOATS = {"F32", "F16", "BF16"}
# Prefix of a metadata field with a tensor's original shape, if GGUF's axes or blocks required another.
SHAPE = "comfy.gguf.orig_shape."


class Stored(NamedTuple):
    """A tensor of a GGUF file.

    `shape` is its own shape and `kind` its packing (F16, Q4_K, …). The file holds an array of `unit` and of
    shape `packed`, which begins `start` bytes after the beginning of the file.
    """

    shape: tuple[int, ...]
    kind: str
    packed: tuple[int, ...]
    unit: np.dtype
    start: int


class GgufCheckpoint:
    """The tensors of a GGUF file. Reads like a `Checkpoint`."""

    config = Checkpoint.config

    def __init__(self, path: Path):
        """Raises UsageError if the file is truncated, damaged or not GGUF."""
        from gguf import GGUFReader  # imported here: it is slow, and few files need it

        class Reader(GGUFReader):
            """Raises an error at the end of the file, where the package would return empty arrays forever."""

            def _get(self, offset, dtype, count=1, override_order=None):
                array = super()._get(offset, dtype, count, override_order)
                if len(array) != count:
                    raise ValueError("it ends too early")
                return array

        self.folder = path
        self.metadata: dict[str, Any] = {}
        try:
            with np.errstate(all="ignore"):
                reader = Reader(path)
                self._tensors = {tensor.name: _stored(reader, tensor) for tensor in reader.tensors}
        except Exception as error:  # the package has no exception for damaged files
            raise UsageError(
                f"{path} is truncated or no GGUF file ({first_line(error)}); download it again"
            ) from None

    def keys(self) -> set[str]:
        return set(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensors[key].shape

    def dtype(self, key: str) -> str:
        """The dtype of what `read` returns, as safetensors names it. Quantised values become F32."""
        kind = self._tensors[key].kind
        return kind if kind in FLOATS else "F32"

    def stored_dtype(self, key: str) -> str:
        """The dtype as GGUF names it: F16, Q8_0, Q4_K, …."""
        return self._tensors[key].kind

    def check_floats(self) -> None:
        """Raises UsageError if the package cannot convert some values to floats."""
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
        """The tensor, or some `rows` of it: float16 as stored, all else as float32.

        Raises UsageError if the file has changed.
        """
        from gguf import GGMLQuantizationType, dequantize

        shape, kind, packed, unit, start = self._tensors[key]
        try:
            with self.folder.open("rb") as file:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            array = np.ndarray(packed, unit, memory, start)
        except (OSError, ValueError, TypeError) as error:  # deleted, emptied or truncated
            raise changed(self.folder, error) from None
        # Blocks do not cross rows, unless the rows in the file differ from those of the tensor.
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
