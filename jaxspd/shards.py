"""One machine's share of many outputs. Does not import jax."""

import re

from jaxspd.errors import UsageError


def share(shard: str | None) -> slice:
    """Which outputs are the share that `shard` names, "I/N": the I-th of every N, from 1; None is all.

    Shares are dealt out one by one, so that each has as much of a list whose outputs grow. UsageError for
    anything else.
    """
    if shard is None:
        return slice(None)
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard) if isinstance(shard, str) else None
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise UsageError(f"shard must be I/N, I from 1 to N, such as 1/4, not {shard!r}")
    return slice(number - 1, None, count)
