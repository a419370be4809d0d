"""Copies between NumPy arrays of any float types, at the rate of memory."""

import mmap
from functools import cache

import ml_dtypes  # noqa: F401  # gives NumPy the conversions of bfloat16
import numpy as np

# Values looked up at a time, for which NumPy makes indices of 8 bytes each.
BLOCK = 1 << 18


def empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An array yet to be filled, aligned so that JAX on a CPU takes it over instead of copying it."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    # Not NumPy's own memory, which comes in huge pages: a virtual machine that lends out what is free gets
    # these back so slowly that a load takes three times as long. These pages are private, and filled with
    # zeros only when they are first used.
    return np.ndarray(shape, dtype, mmap.mmap(-1, max(size, 1), access=mmap.ACCESS_COPY))


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """Fills `target` with `source`, of the same shape and any float type; rounds to nearest even.

    NaN stays NaN, and what is too large becomes infinite. Other threads run in the meantime, since NumPy and
    ml_dtypes let go of the interpreter while they convert.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if source.dtype == np.float16 != target.dtype and target.flags.c_contiguous:
            look_up(target.reshape(-1), source.reshape(-1).view(np.uint16), every(source.dtype, target.dtype))
        else:
            np.copyto(target, source, casting="unsafe")


def look_up(target: np.ndarray, bits: np.ndarray, values: np.ndarray) -> None:
    """Fills the row `target` with the `values` that `bits` number: twice as fast as NumPy's conversion."""
    for start in range(0, len(bits), BLOCK):
        part = slice(start, start + BLOCK)
        # Its default mode would hold the result back until every index is known to be good.
        np.take(values, bits[part], out=target[part], mode="clip")


@cache
def every(kind: np.dtype, dtype: np.dtype) -> np.ndarray:
    """Each of the values of `kind`, a type of 8 or 16 bits, in `dtype`."""
    bits = kind.itemsize * 8
    return np.arange(1 << bits, dtype=f"u{kind.itemsize}").view(kind).astype(dtype)
