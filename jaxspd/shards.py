"""One machine's share of many outputs. Does not import jax."""

import re

from jaxspd.errors import UsageError


def share(shard: str | None) -> slice:
    """The slice of all outputs that `shard`, "I/N", names: the I-th of every N, from 1. None means all.

    Outputs are dealt out in turn, so that all shares take about as long if later outputs take longer. Raises
    UsageError for anything else.
    """
    if shard is None:
        return slice(None)
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard) if isinstance(shard, str) else None
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise UsageError(f"shard must be I/N, I from 1 to N, such as 1/4, not {shard!r}")
    return slice(number - 1, None, count)
