"""SIGTERM as an interrupt: it unwinds the stack, so that nothing is left half written."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """Raised when SIGTERM arrives."""


@contextmanager
def terminable() -> Iterator[None]:
    """A context in which SIGTERM raises `Terminated`. It does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def undisturbed() -> Iterator[None]:
    """A context that delays SIGINT and SIGTERM to its end. A write that they interrupt may be repeated."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    ends = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for missed in came:
        signal.raise_signal(missed)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """The exit code of an interrupted command: 128 plus the signal's number, as in shells."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)
