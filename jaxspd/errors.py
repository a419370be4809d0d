"""The one exception for what the user can mend. It is defined in `convert`, which raises it too."""

from jaxspd.convert.errors import UsageError, first_line

__all__ = ["UsageError", "first_line"]
