"""How much memory there is, what to say when it does not suffice, and what the C library does with what is
freed.
"""

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax

from jaxspd.errors import UsageError, first_line

LESS_MEMORY = (
    "use a smaller height and width or fewer frames, or dit_cpu_offload, which keeps the transformer's "
    "layers in host memory where the device has memory of its own"
)
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


def memory_limit() -> float:
    """Bytes that a program and all it works on may take: what JAX may take of the device, or on a CPU the
    host's memory with its swap; infinite where neither says.
    """
    if limit := (jax.devices()[0].memory_stats() or {}).get("bytes_limit"):
        return limit
    # More than this is no error of any allocation: Linux ends the process.
    with suppress(OSError, KeyError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        return 1024 * (kilobytes["MemTotal"] + kilobytes["SwapTotal"])
    return math.inf


@contextmanager
def memory_for(what: str, cure: str = LESS_MEMORY) -> Iterator[None]:
    """Meanwhile, running out of memory is a UsageError that says that `what` took it, and the cure."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        # Of the libraries' explanations, how much they asked for.
        line = first_line(error)[:200]
        raise UsageError(f"{what} takes more memory than there is ({line}); {cure}") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` is what NumPy, JAX or PyTorch raises for want of memory, host's or device's."""
    text = str(error).lower()
    said = ("out of memory", "resource_exhausted", "can't allocate memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(s in text for s in said)
    )
