"""Rounds weights to 8 bits while they are read: `X.weight` in int8 or float8, with its scales in
`X.weight_scale`.
"""

from collections.abc import Mapping
from threading import Lock
from typing import Any

import ml_dtypes
import numpy as np

from .copying import copy, empty
from .table import SCALE

# The largest number of each type. Of int8 only the symmetric range is used.
LARGEST = {np.dtype(np.int8): 127.0, np.dtype(ml_dtypes.float8_e4m3fn): 448.0}
# How many numbers are rounded at a time, in float32.
BLOCK = 1 << 22


class Quantized:
    """The tensors of `checkpoint`; those named in `dtypes` are rounded to these dtypes and have a scale per
    row.

    The first request for a weight or its scales reads the tensor. The other array waits in memory until it is
    requested, so each must be requested exactly once.
    """

    def __init__(self, checkpoint: Any, dtypes: Mapping[str, np.dtype]):
        self.folder, self.config, self._checkpoint = checkpoint.folder, checkpoint.config, checkpoint
        found = checkpoint.keys()
        self._dtypes = {key: np.dtype(dtype) for key, dtype in dtypes.items() if key in found}
        self._scales = {key + SCALE: key for key in self._dtypes}
        self._locks = {key: Lock() for key in self._dtypes}
        self._waiting: dict[str, np.ndarray] = {}

    def keys(self) -> set[str]:
        return self._checkpoint.keys() | self._scales.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        if key in self._scales:
            return self._checkpoint.shape(self._scales[key])[:1]
        return self._checkpoint.shape(key)

    def dtype(self, key: str) -> str:
        """The dtype as the file stores it; F32 for scales."""
        return "F32" if key in self._scales else self._checkpoint.dtype(key)

    def check_floats(self) -> None:
        self._checkpoint.check_floats()

    def read(self, key: str) -> np.ndarray:
        weight = self._scales.get(key, key)
        if weight not in self._dtypes:
            return self._checkpoint.read(key)
        with self._locks[weight]:
            if key not in self._waiting:
                values, scales = round_rows(self._checkpoint.read(weight), self._dtypes[weight])
                self._waiting |= {weight: values, weight + SCALE: scales}
            return self._waiting.pop(key)


def round_rows(weight: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """`weight` `[rows, ...]` rounded to nearest in `dtype`, and the units `[rows]`, float32. The unit makes
    the largest magnitude of a row the largest number of `dtype`.
    """
    values, units = empty(weight.shape, dtype), np.ones(len(weight), np.float32)
    step = max(1, BLOCK // max(1, weight[:1].size))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        block = np.empty(weight[rows].shape, np.float32)
        copy(block, weight[rows])
        exact = block.reshape(len(block), -1)
        unit = np.abs(exact).max(axis=1, initial=0) / np.float32(LARGEST[np.dtype(dtype)])
        units[rows] = np.where(unit == 0, 1, unit)
        with np.errstate(invalid="ignore"):  # weights that are not finite have such a unit too
            exact /= units[rows, None]
            if dtype == np.int8:
                np.rint(exact, out=exact)
            values[rows] = exact.astype(dtype).reshape(weight[rows].shape)
    return values, units
