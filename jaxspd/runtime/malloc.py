"""What the C library does with memory that is freed."""

import ctypes
from contextlib import suppress

# glibc's numbers for its options.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """From now on, glibc keeps what is freed for what is allocated next.

    Otherwise it returns large blocks to the system, which clears them page by page when they are asked for
    again: on a CPU, at every layer of every step. Blocks of a GiB and more still go back, and so does what is
    beyond 2 GiB at the end of all. Other C libraries are left as they are.
    """
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
