"""How much memory there is, and what to say when it does not suffice."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import psutil

from jaxspd.errors import UsageError, first_line

LESS_MEMORY = (
    "use a smaller height and width or fewer frames, or dit_cpu_offload, which keeps the transformer's "
    "layers in host memory where the device has memory of its own"
)
CGROUP = Path("/sys/fs/cgroup")


def host_memory() -> tuple[int, int]:
    """Bytes available and in all: the machine's, or those of the container that this runs in."""
    machine = psutil.virtual_memory()
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no container, or one without a limit
        return machine.available, machine.total
    stat = {name: int(value) for name, value in (line.split() for line in lines)}
    # Files that were read are counted as used, but give way.
    used -= stat.get("active_file", 0) + stat.get("inactive_file", 0)
    return min(machine.available, limit - used), min(machine.total, limit)


def memory_limit(device: jax.Device) -> int:
    """Bytes that a program and all it works on may take: what JAX may take of `device`, or on a CPU the
    host's memory with its swap.
    """
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return limit
    # More than this is no error of any allocation: Linux ends the process.
    swap = psutil.swap_memory().total
    with suppress(OSError, ValueError):
        swap = min(swap, int((CGROUP / "memory.swap.max").read_text()))
    return host_memory()[1] + swap


def coding_memory(device: jax.Device) -> int | None:
    """Bytes that decoding on `device` may take: on a CPU half of the host's memory, and no more than 8 GiB;
    None for a device with memory of its own, which tells what is free.

    Not what is free on the host: that changes from hour to hour, and tiles, which save memory, show.
    """
    return min(host_memory()[1] // 2, 8 * 2**30) if device.platform == "cpu" else None


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
