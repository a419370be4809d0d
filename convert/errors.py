"""The one exception for mistakes that the user can correct."""


class UsageError(ValueError):
    """A request that cannot be served as it is. Its one-line message says what to change.

    The command line prints the message on stderr and exits with code 2. The message may contain names from
    files: characters that cannot be printed, line breaks included, are escaped.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """`text` in one line, with escapes such as `\\n` for characters that cannot be printed."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's class if it has none. Libraries' messages can be a
    page long.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
