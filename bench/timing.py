"""Median times of calls in this process."""

import statistics
import time
from collections.abc import Callable, Mapping


def in_turns(calls: Mapping[str, Callable[[], object]], times: int = 7) -> dict[str, float]:
    """The median seconds of each of `calls`, which run in turns, `times` times each.

    A first turn does not count. A call must return only when its work has ended.
    """
    taken = {name: [] for name in calls}
    for _ in range(times + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def median_seconds(call: Callable[[], object], times: int = 7) -> float:
    """The median seconds of one call, as `in_turns` measures it."""
    return in_turns({"": call}, times)[""]
