"""Standard streams that accept every character and survive a reader that ends. Imports nothing heavy."""

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from threading import Thread


class Unread(io.FileIO):
    """A file that ignores a broken pipe: it accepts what nobody reads any more."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def harden_streams() -> None:
    """Makes stdout and stderr accept every character, and ignore that they are closed or no longer read.

    A character that the encoding lacks is written as "?". So a picture is not lost because its report cannot
    be written. Streams that are not the process's own, as in tests, are only made to accept every
    character.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the parent process closed it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):
            # The stream gets a descriptor of its own, so that libraries' output can go elsewhere.
            raw = Unread(os.dup(stream.fileno()), "w")
            hardened = io.TextIOWrapper(
                io.BufferedWriter(raw),
                encoding=stream.encoding,
                errors="replace",
                line_buffering=stream.line_buffering,
            )
            stream.flush()
            setattr(sys, name, hardened)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def flush_stdout() -> None:
    """Writes out what has been printed. Raises OSError if that fails, for example on a full disk.

    What could not be written is dropped. Otherwise the interpreter would try again when it ends, and
    complain.
    """
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):  # not a file, in tests
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
        raise


def divert_libraries(hear: Callable[[str], None]) -> None:
    """Calls `hear`, in a thread, with each line that libraries write past Python's stdout and stderr.

    `harden_streams` must have made these streams.
    """
    read, write = os.pipe()
    for number in (1, 2):
        os.dup2(write, number)
    os.close(write)

    def listen() -> None:
        with open(read, errors="replace") as lines:
            for line in lines:
                hear(line)

    Thread(target=listen, daemon=True).start()
