"""What the C library does with memory that is freed."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# glibc's numbers for its options.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Meanwhile, glibc keeps what is freed for what is allocated next.

    Otherwise it returns large blocks to the system, which clears them page by page when they are asked for
    again: on a CPU, at every layer of every step. Other C libraries are left as they are.
    """
    _set_thresholds(mmap=2**30, trim=2**31 - 1)
    try:
        yield
    finally:
        # As far as glibc goes by itself.
        _set_thresholds(mmap=2**25, trim=2**26)


def _set_thresholds(mmap: int, trim: int) -> None:
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, mmap)
        mallopt(M_TRIM_THRESHOLD, trim)
