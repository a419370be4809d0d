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
    """The available and the total bytes of the machine, or of the container that the process runs in."""
    machine = psutil.virtual_memory()
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no container, or one without a limit
        return machine.available, machine.total
    stat = {name: int(value) for name, value in (line.split() for line in lines)}
    # Cached files count as used, but give way.
    used -= stat.get("active_file", 0) + stat.get("inactive_file", 0)
    return min(machine.available, limit - used), min(machine.total, limit)


def memory_limit(device: jax.Device) -> int:
    """The most bytes that a program and its arguments may take.

    That is what JAX may take of `device`, or on a CPU the host's memory with its swap.
    """
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return limit
    # Beyond this no allocation fails with an error: Linux kills the process.
    swap = psutil.swap_memory().total
    with suppress(OSError, ValueError):
        swap = min(swap, int((CGROUP / "memory.swap.max").read_text()))
    return host_memory()[1] + swap


def coding_memory(device: jax.Device) -> int | None:
    """The most bytes that decoding may take: on a CPU half of the host's memory, but no more than 8 GiB.

    It is None for a device with memory of its own, which says itself how much is free. What is free on the
    host does not count: it changes from hour to hour, and the tiles that save memory are visible in the
    picture.
    """
    return min(host_memory()[1] // 2, 8 * 2**30) if device.platform == "cpu" else None


@contextmanager
def memory_for(what: str, cure: str = LESS_MEMORY) -> Iterator[None]:
    """A context that turns running out of memory into a UsageError, which names `what` and the `cure`."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        # The first line of a library's explanation says how much it asked for.
        line = first_line(error)[:200]
        raise UsageError(f"{what} takes more memory than there is ({line}); {cure}") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` is what NumPy, JAX or PyTorch raises when the host or device has too little memory."""
    text = str(error).lower()
    said = ("out of memory", "resource_exhausted", "can't allocate memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(s in text for s in said)
    )
