"""Making the C library keep memory that is freed."""

import ctypes
from contextlib import suppress

# glibc's numbers for its options.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for later allocations.

    By default glibc returns large blocks to the system, which clears them page by page when they are
    allocated again. On a CPU that would happen at every layer of every step. Blocks of 1 GiB and more are
    still returned, and so is free memory beyond 2 GiB at the heap's end. Other C libraries are left as they
    are.
    """
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
