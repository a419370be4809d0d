"""The one exception for what the user can mend."""


class UsageError(ValueError):
    """A request that cannot be served as it stands; its one-line message says what to change.

    The command line prints the message on stderr and exits with code 2.
    """


def first_line(error: Exception) -> str:
    """What `error` says first, or its kind where it says nothing: libraries go on for a page."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
