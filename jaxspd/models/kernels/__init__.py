"""Ways to compute attention, a module each; `models.attention` chooses.

Each has `attend` over `[B, N, heads, head_dim]`, and `PLATFORM`, where it runs, None being everywhere.
"""


class Unserved(Exception):
    """A backend cannot serve such arguments, or not here. Says why."""
