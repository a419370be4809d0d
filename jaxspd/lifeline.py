"""What holds the processes of one run together: each hears what the first tells, and of another's end."""

import queue
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from threading import Lock, Thread
from typing import Any

# Seconds between signs of life, and after how many without one a process counts as ended: the kernel closes
# what a killed one leaves open, but nobody does for a machine that has lost its power.
SIGN, SILENCE = 10, 100
# Seconds that the first waits when another has ended: both may have been refused the same, and then its own
# line is the better one.
GRACE = 2


class Lifeline:
    """The `connections` of process `index`: those of process 0 lead to all others, any other's to process 0.

    `end(code, line)` is to end this process, with a line on stderr unless that is None. It is called in a
    thread, when process 0 says so, or when a process has ended though nobody has said so.
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
        """Process 0 tells the others."""
        self._send("tell", value)

    def hear(self) -> Any:
        """What process 0 tells next."""
        return self._told.get()

    def part(self, code: int) -> None:
        """Process 0 makes the others end with `code`, and waits until they have."""
        self.done = True
        self._send("end", (code, None))
        for thread in self._threads:
            thread.join(GRACE)

    def _send(self, kind: str, value: Any) -> None:
        with self._sending:
            for connection in self._connections.values():
                with suppress(OSError):  # it has ended, and who listens will hear so
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
