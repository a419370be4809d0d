"""Several processes that make the same outputs together. The first decides, writes and prints; all compute.

Imports no jax before a process joins others.
"""

import atexit
import ctypes
import json
import logging
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from threading import Lock, Timer
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from jaxspd.errors import UsageError, first_line
from jaxspd.lifeline import GRACE, Lifeline
from jaxspd.streams import divert_libraries, flush_stdout

log = logging.getLogger("jaxspd")
T = TypeVar("T")
# The seconds in which all processes must have come.
TIMEOUT = 60
# The seconds after which JAX gives up by itself. They are more than any limit here, because JAX then aborts
# instead of printing one line.
LATER = 7200
MOST_SECONDS = 3600
# The seconds that writing a file may still take when the process must end.
WRITING = 60
# The bytes of the message that says where the first process listens.
PLACE = 256
# What XLA prints before it aborts.
FATAL = re.compile(r"F\d{4} [\d:.]+ +\d+ \S+\] (.*)")
# This lock is held while a file is written, so that the process does not end before that is done.
writing = Lock()
_index, _count = 0, 1
_lifeline: Lifeline | None = None


def first() -> bool:
    """Whether this process writes and prints: it is the only one, or the first of several."""
    return _index == 0


def count() -> int:
    """The number of processes that have joined, this one included."""
    return _count


def told(make: Callable[[], T]) -> T:
    """The result of `make` in the first process, returned in all. All must make the same calls in order."""
    if _lifeline is None:
        return make()
    if _index:
        return _lifeline.hear()
    value = make()
    _lifeline.tell(value)
    return value


def least(value: float) -> float:
    """The least `value` of all processes, rounded to float32."""
    if _lifeline is None:
        return value
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    return float(process_allgather(np.float32(value)).min())


def give_way(refused: bool) -> None:
    """Waits before this process prints why it ends.

    If this is not the first process, the first may print the same reason, and then ends this one silently.
    Unless this process was `refused` something itself, another one may have ended. The lifeline then prints
    that and ends this one.
    """
    if _index or (_lifeline and not refused):
        time.sleep(3 * GRACE)


def leave(code: int) -> int:
    """Ends a run of several processes with the exit code `code`.

    It returns `code` if this process is alone. If `code` is 0, it returns that as soon as the first process
    has come here too. For any other code it ends this process and the others.
    """
    if _lifeline is None:
        return code
    if code == 0:
        told(lambda: None)
        _done()
        return code
    if _index == 0:
        _lifeline.part(code)
    _exit(code)


def join(
    dist_init_addr: str | None = None,
    nnodes: int | None = None,
    node_rank: int | None = None,
    dist_timeout: float = TIMEOUT,
    quiet: bool = False,
) -> None:
    """Waits for the other processes, and makes JAX see all their devices. Call this before any use of JAX.

    The first of `nnodes` processes has `node_rank` 0 and is reached at `dist_init_addr`, HOST:PORT. The
    environment gives the missing ones, as `jax.distributed.initialize` reads it: JAX_COORDINATOR_ADDRESS,
    Slurm, Open MPI, Kubernetes or a TPU pod. With Slurm or Open MPI, each process has one of its machine's
    GPUs. Otherwise it has all GPUs that it sees. If not all processes have come after `dist_timeout` seconds,
    this process ends with one line and code 2. `quiet` silences what libraries print. Raises UsageError if an
    argument is missing or makes no sense.
    """
    import jax

    from jaxspd.runtime.backend import start_backend

    global _index, _count, _lifeline
    address = dist_init_addr or os.environ.get("JAX_COORDINATOR_ADDRESS")
    _check(address, nnodes, node_rank, dist_timeout)
    if quiet:
        divert_libraries(_hear_libraries)
        logging.getLogger("jax").setLevel(logging.ERROR)
    _let_aborts_wait()
    where = f"the first process at {address}" if address else "the first process"
    if node_rank == 0:
        where = f"all of {nnodes} processes at {address}"
    lack = (
        f"cannot reach {where} within {dist_timeout:g} seconds; start all at once, and check dist_init_addr"
    )
    timer = Timer(dist_timeout, _end, (2, lack))
    timer.daemon = True
    timer.start()
    known = None not in (address, nnodes, node_rank)
    try:
        jax.distributed.initialize(
            address,
            nnodes,
            node_rank,
            cluster_detection_method="deactivate" if known else None,
            initialization_timeout=LATER,
            heartbeat_timeout_seconds=LATER,
        )
    except ValueError as error:
        raise UsageError(
            f"the environment does not say all about the processes ({first_line(error)}); give "
            "dist_init_addr, nnodes and node_rank"
        ) from error
    except RuntimeError as error:
        raise UsageError(f"the processes cannot join ({first_line(error)})") from error
    start_backend()
    if jax.process_count() > 1:
        _index, _count = jax.process_index(), jax.process_count()
        connections = _connect(address)
        _lifeline = Lifeline(_index, connections, _end)
        atexit.register(_done)
    timer.cancel()
    if quiet and _index:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        log.setLevel(logging.ERROR)


def _check(address: str | None, nnodes: int | None, node_rank: int | None, dist_timeout: float) -> None:
    if nnodes is not None and nnodes < 1:
        raise UsageError(f"nnodes must be 1 or more, not {nnodes}")
    if node_rank is not None:
        if nnodes is None:
            raise UsageError("node_rank is of no use alone; give nnodes too")
        if not 0 <= node_rank < nnodes:
            raise UsageError(f"node_rank must be 0 or more and less than nnodes, not {node_rank}")
    if not 0 < dist_timeout <= MOST_SECONDS:
        raise UsageError(f"dist_timeout must be more than 0 and at most {MOST_SECONDS}, not {dist_timeout:g}")
    if address is not None:
        port = re.fullmatch(r"\S+:(\d{1,5})", address)
        if not port or not 0 < int(port[1]) < 2**16:
            raise UsageError(f"dist_init_addr must be HOST:PORT, such as 10.0.0.1:25000, not {address}")


def _connect(address: str | None) -> dict[int, Connection]:
    """The first process's connections to all others, or another's connection to the first, by process number.

    JAX tells the others where the first one listens, and a key that only these processes know.
    """
    import jax
    import numpy as np
    from jax.experimental.multihost_utils import broadcast_one_to_all

    if jax.device_count() != jax.local_device_count() * jax.process_count():
        raise UsageError(
            f"of {jax.device_count()} devices this process has {jax.local_device_count()}, and there are "
            f"{jax.process_count()} processes; let each have as many"
        )
    host, listener, key = "", None, secrets.token_hex(16)
    if _index == 0:
        host = address.rpartition(":")[0] if address else _own_address()
        listener = Listener(("", 0), backlog=_count, authkey=key.encode())
    place = json.dumps([host, listener and listener.address[1], key]).encode().ljust(PLACE)
    told = broadcast_one_to_all(np.frombuffer(place, np.uint8)).tobytes()
    if listener is None:
        host, port, key = json.loads(told)
        connection = Client((host, port), authkey=key.encode())
        connection.send(_index)
        return {0: connection}
    connections: dict[int, Any] = {}
    with listener:
        while len(connections) < _count - 1:
            with suppress(AuthenticationError, EOFError, ConnectionError):  # a stranger's connection
                connection = listener.accept()
                connections[connection.recv()] = connection
    return connections


def _own_address() -> str:
    """The address of this machine in its network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def _let_aborts_wait() -> None:
    """Makes `abort` call `sleep` first, for as many seconds as its signal's number.

    XLA aborts when it loses another process. In these seconds another thread can print the reason.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _hear_libraries(line: str) -> None:
    if fatal := FATAL.match(line):
        time.sleep(GRACE + 1)  # the lifeline may give a better reason first
        _end(1, f"JAX gives up ({fatal[1].rpartition('absl::Status: ')[2][:200]})")


def _done() -> None:
    if _lifeline:
        _lifeline.done = True


def _end(code: int, line: str | None) -> None:
    """Ends this process, from any thread, as soon as it writes no file."""
    writing.acquire(timeout=WRITING)
    with tqdm.external_write_mode(sys.stderr):
        if line:
            log.error("jaxspd: %s", line)
        _exit(code)


def _exit(code: int) -> NoReturn:
    with suppress(OSError):
        flush_stdout()
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(code)
