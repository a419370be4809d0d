"""Copies between NumPy arrays of any float types, at the rate of memory."""

import mmap

import ml_dtypes  # noqa: F401  # gives NumPy the conversions of bfloat16
import numpy as np


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
        np.copyto(target, source, casting="unsafe")
