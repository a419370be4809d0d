"""Chooses jobs that are made together in one batch."""

import logging
import math
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from jaxspd.errors import first_line
from jaxspd.request import Request
from jaxspd.together import shape

log = logging.getLogger("jaxspd.server")
# A batch must take at most this share of the time per job alone. Its first job waits for its last, and the
# last bits of its pictures differ from those made alone.
WORTH = 0.8
# Number of jobs made alone, and of batches, to measure their times, in turns. The shortest time counts:
# compiling and other work of the machine only add to it.
TRIALS = 3
# Number of jobs of a shape after which its times are measured anew: the machine may do other work by then.
AGAIN = 100
# Number of recent shapes whose times are kept.
RECENT = 16


class Batches:
    """Batches of jobs of one shape for `generator`. Their sizes are powers of two, up to `most`.

    A size is used only where it has proved faster, or has yet to be tried, and only once its programs are
    compiled: no job waits for compilation.
    """

    def __init__(self, generator: Any, most: int):
        self._generator, self._most, self._turn = generator, most, False
        # Shape -> size -> the seconds per job of each time.
        self._found: OrderedDict[str, dict[int, list[float]]] = OrderedDict()

    def choose(self, request: Request, waiting: Iterable[Request]) -> list[int]:
        """The indices in `waiting` of the requests that are made in one batch with `request`."""
        own = shape(request)
        if self._most == 1 or request.num_outputs_per_prompt > 1:
            return []
        alike = [place for place, other in enumerate(waiting) if shape(other) == own]
        size = 1 << min(1 + len(alike), self._most).bit_length() - 1
        while size > 1:
            worth = self._worth(request, own, size)
            if worth is None:
                self._turn = not self._turn
                return alike[: size - 1] if self._turn else []
            if worth:
                return alike[: size - 1]
            size //= 2
        return []

    def note(self, request: Request, size: int, seconds: float) -> None:
        """Records that `size` jobs of this shape took `seconds`. Infinity means that they cannot be made
        together.
        """
        own = shape(request)
        found = self._found.pop(own, {})
        if sum(number * len(times) for number, times in found.items()) >= AGAIN:
            found = {}
        found.setdefault(size, []).extend([seconds / size] * (1 if seconds < math.inf else TRIALS))
        self._found[own] = found
        while len(self._found) > RECENT:
            self._found.popitem(last=False)

    def _worth(self, request: Request, own: str, size: int) -> bool | None:
        """Whether `size` jobs are made together. None means that this is yet to be tried."""
        found = self._found.get(own, {})
        alone, times = (found.get(number, [])[-TRIALS:] for number in (1, size))
        if len(alone) < TRIALS or (len(times) == TRIALS and min(times) > WORTH * min(alone)):
            return False
        try:
            ready = self._generator.ready_together(request, size)
        except Exception as error:  # the jobs can still be made alone
            log.warning("%d requests cannot be made together (%s)", size, first_line(error))
            self.note(request, size, math.inf)
            return False
        return None if ready and len(times) < TRIALS else ready
