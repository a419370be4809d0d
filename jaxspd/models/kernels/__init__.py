"""Attention backends, one module each; `models.attention` chooses between them.

Each module has a function `attend` over `[B, N, heads, head_dim]` and a constant `PLATFORM`, the platform
that it needs; None means that it runs everywhere.
"""


class Unserved(Exception):
    """A backend cannot serve these arguments, or cannot run here. The message says why."""
