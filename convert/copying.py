"""Copies between NumPy arrays of any float types, as fast as memory allows."""

import mmap
from functools import cache

import ml_dtypes  # noqa: F401  # teaches NumPy to convert bfloat16
import numpy as np

# Number of values that are looked up at a time. NumPy makes an index of 8 bytes for each.
BLOCK = 1 << 18


def empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An array without values, aligned so that JAX on a CPU can use it without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    # NumPy's own memory comes in huge pages. Some virtual machines lend out free memory and get huge pages
    # back so slowly that loading takes three times as long. The pages used here are private, and are filled
    # with zeros only at first use.
    return np.ndarray(shape, dtype, mmap.mmap(-1, max(size, 1), access=mmap.ACCESS_COPY))


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """Fills `target` with `source`, which has the same shape and any float type. Values are rounded to
    nearest even.

    NaN stays NaN, and values that are too large become infinite. Other threads run meanwhile, since NumPy and
    ml_dtypes release the GIL during conversion.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if source.dtype == np.float16 != target.dtype and target.flags.c_contiguous:
            look_up(target.reshape(-1), source.reshape(-1).view(np.uint16), every(source.dtype, target.dtype))
        else:
            np.copyto(target, source, casting="unsafe")


def look_up(target: np.ndarray, bits: np.ndarray, values: np.ndarray) -> None:
    """Fills `target` `[N]` with `values[bits]`. This is twice as fast as NumPy's conversion."""
    for start in range(0, len(bits), BLOCK):
        part = slice(start, start + BLOCK)
        # In NumPy's default mode the result is buffered until all indices are checked.
        np.take(values, bits[part], out=target[part], mode="clip")


@cache
def every(kind: np.dtype, dtype: np.dtype) -> np.ndarray:
    """All values of `kind`, a type of 8 or 16 bits, in order of their bits and converted to `dtype`."""
    bits = kind.itemsize * 8
    return np.arange(1 << bits, dtype=f"u{kind.itemsize}").view(kind).astype(dtype)
