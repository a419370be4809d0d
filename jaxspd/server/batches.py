"""Which jobs are made together."""

import logging
import math
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from jaxspd.errors import first_line
from jaxspd.request import Request
from jaxspd.together import shape

log = logging.getLogger("jaxspd.server")
# A batch must take a job less than this share of what it takes alone: its first waits for its last, and the
# last bits of a picture are not those that it has alone.
WORTH = 0.8
# Jobs alone, and then batches, that are made to find that out. The best of them tells: compiling, and what
# else a machine does, only make them slower.
TRIALS = 3
# What was found is kept for so many shapes and sizes that were made last.
RECENT = 64


class Batches:
    """Puts together jobs of one shape for `generator`, up to `most` and a power of two, where that has proved
    faster, and once the programs are compiled: no job waits for that.
    """

    def __init__(self, generator: Any, most: int):
        self._generator, self._most = generator, most
        # (shape, jobs at once) -> the least seconds a job, and how often that was tried.
        self._found: OrderedDict[tuple[str, int], tuple[float, int]] = OrderedDict()

    def choose(self, request: Request, waiting: Iterable[Request]) -> list[int]:
        """The places in `waiting` of those to be made with `request`."""
        own = shape(request)
        if self._most == 1 or request.num_outputs_per_prompt > 1:
            return []
        alike = [place for place, other in enumerate(waiting) if shape(other) == own]
        size = 1 << min(1 + len(alike), self._most).bit_length() - 1
        while size > 1 and not self._worth(request, own, size):
            size //= 2
        return alike[: size - 1]

    def note(self, request: Request, size: int, seconds: float) -> None:
        """So many jobs like this took so long; infinity where they cannot be made together."""
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
        except Exception as error:  # whoever is made alone is not to suffer
            log.warning("%d requests cannot be made together (%s)", size, first_line(error))
            self.note(request, size, math.inf)
            return False
