"""Output that neither a character nor a reader who leaves can break. Imports nothing heavy."""

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from threading import Thread


class Unread(io.FileIO):
    """A file that takes what nobody reads any more."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def harden_streams() -> None:
    """Makes stdout and stderr take every character, a ? for what their encoding lacks, and go on quietly
    where they are closed or the program that reads them has ended: a picture is not lost with its report.

    Streams that are not the process's own, as in tests, only take every character.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started the process
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):
            # Of its own, so that libraries' output can go elsewhere.
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
    """Writes out what has been printed. OSError where that fails, as on a full disk; what could not be
    written is dropped, or the interpreter would try again when it ends, and complain.
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
    """Gives `hear`, in a thread, every line that libraries write to stdout and stderr past Python's streams,
    which `harden_streams` has made.
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
