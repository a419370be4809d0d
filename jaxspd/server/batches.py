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
# A batch must take less than this share of the time per job alone. Its first job waits for its last, and the
# last bits of its pictures differ from those made alone.
WORTH = 0.8
# Number of jobs made alone, and then of batches, to measure their times. The shortest time counts: compiling
# and other work of the machine only add to it.
TRIALS = 3
# Number of recent shapes and sizes whose times are kept.
RECENT = 64


class Batches:
    """Batches of jobs of one shape for `generator`. Their sizes are powers of two, up to `most`.

    A size is used only where it has proved faster, or has yet to be tried, and only once its programs are
    compiled: no job waits for compilation.
    """

    def __init__(self, generator: Any, most: int):
        self._generator, self._most = generator, most
        # (shape, size) -> the shortest seconds per job, and the number of trials.
        self._found: OrderedDict[tuple[str, int], tuple[float, int]] = OrderedDict()

    def choose(self, request: Request, waiting: Iterable[Request]) -> list[int]:
        """The indices in `waiting` of the requests that are made in one batch with `request`."""
        own = shape(request)
        if self._most == 1 or request.num_outputs_per_prompt > 1:
            return []
        alike = [place for place, other in enumerate(waiting) if shape(other) == own]
        size = 1 << min(1 + len(alike), self._most).bit_length() - 1
        while size > 1 and not self._worth(request, own, size):
            size //= 2
        return alike[: size - 1]

    def note(self, request: Request, size: int, seconds: float) -> None:
        """Records that `size` jobs of this shape took `seconds`. Infinity means that they cannot be made
        together.
        """
        key = shape(request), size
        least, tried = self._found.pop(key, (math.inf, 0))
        self._found[key] = min(least, seconds / size), tried + 1 if seconds < math.inf else TRIALS
        while len(self._found) > RECENT:
            self._found.popitem(last=False)

    def _worth(self, request: Request, own: str, size: int) -> bool:
        unknown = math.inf, 0
        (alone, tried_alone), (least, tried) = (self._found.get((own, n), unknown) for n in (1, size))
        if tried_alone < TRIALS or (tried >= TRIALS and least > WORTH * alone):
            return False
        try:
            return self._generator.ready_together(request, size)
        except Exception as error:  # the jobs can still be made alone
            log.warning("%d requests cannot be made together (%s)", size, first_line(error))
            self.note(request, size, math.inf)
            return False
