"""The one exception for what the user can mend."""


class UsageError(ValueError):
    """A request that cannot be served as it stands; its one-line message says what to change.

    The command line prints the message on stderr and exits with code 2. Names in it may come from files:
    what cannot be printed of them, line breaks included, is shown as an escape.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """`text` in one line, with escapes such as `\\n` for what cannot be printed."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error: Exception) -> str:
    """What `error` says first, or its kind where it says nothing: libraries go on for a page."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
