"""The one exception for what the user can mend; reading checkpoints raises it too, so it lives there."""

from jaxspd.convert.errors import UsageError, first_line

__all__ = ["UsageError", "first_line"]
