"""The connections between a run's processes. Each hears what the first tells, and when another ends."""

import queue
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from threading import Lock, Thread
from typing import Any

# The seconds between signs of life, and the seconds without one after which a process counts as ended. The
# kernel closes the connections of a killed process, but nobody closes those of a machine without power.
SIGN, SILENCE = 10, 100
# The seconds that the first process waits when another has ended. Both may have ended for the same reason,
# and then the first one's own message is the better one.
GRACE = 2


class Lifeline:
    """The `connections` of process `index`. Process 0 has one to each other process, which has one to it.

    `end(code, line)` must end this process, with `line` on stderr unless that is None. It is called in a
    thread, when process 0 orders it, or when a process has ended unexpectedly.
    """

    def __init__(
        self, index: int, connections: Mapping[int, Connection], end: Callable[[int, str | None], None]
    ):
        self._index, self._connections, self._end = index, connections, end
        self._told: queue.SimpleQueue = queue.SimpleQueue()
        self._sending, self.done = Lock(), False
        self._threads = [Thread(target=self._hear, args=pair, daemon=True) for pair in connections.items()]
        for thread in (*self._threads, Thread(target=self._live, daemon=True)):
            thread.start()

    def tell(self, value: Any) -> None:
        """Sends `value` from process 0 to the others."""
        self._send("tell", value)

    def hear(self) -> Any:
        """Waits for the next value that process 0 tells, and returns it."""
        return self._told.get()

    def part(self, code: int) -> None:
        """Makes the other processes end with `code`, and waits until they have. Only process 0 calls this."""
        self.done = True
        self._send("end", (code, None))
        for thread in self._threads:
            thread.join(GRACE)

    def _send(self, kind: str, value: Any) -> None:
        with self._sending:
            for connection in self._connections.values():
                with suppress(OSError):  # the process has ended, which `_hear` notices
                    connection.send((kind, value))

    def _live(self) -> None:
        while True:
            time.sleep(SIGN)
            self._send("live", None)

    def _hear(self, number: int, connection: Connection) -> None:
        try:
            while connection.poll(SILENCE):
                kind, value = connection.recv()
                if kind == "tell":
                    self._told.put(value)
                elif kind == "end":
                    self._end(*value)
        except (EOFError, OSError):
            pass
        if self._index == 0:
            time.sleep(GRACE)
        if self.done:
            return
        line = f"process {number} has ended, and the others with it"
        if self._index == 0:
            self._send("end", (1, line))
        self._end(1, line)
