"""Renames the tensors of text encoders, whose names differ from file to file, to the names in the tables."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from .checkpoint import Checkpoint
from .errors import UsageError


class Renamed:
    """The tensors of `checkpoint` that a text encoder reads, by their names in its table. Reads like a
    `Checkpoint`.

    `names_of` finds them among the stored keys; it is a table's function `names`.
    """

    config = Checkpoint.config

    def __init__(self, checkpoint: Checkpoint, names_of: Callable[[set[str]], Mapping[str, str]]):
        """Raises UsageError if two stored tensors have the same name in the table."""
        self.folder, self._checkpoint = checkpoint.folder, checkpoint
        try:
            self._stored = names_of(checkpoint.keys())
        except UsageError as error:
            raise UsageError(f"{checkpoint.folder}: {error}") from None

    def keys(self) -> set[str]:
        return set(self._stored)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._checkpoint.shape(self._stored[key])

    def dtype(self, key: str) -> str:
        return self._checkpoint.dtype(self._stored[key])

    def check_floats(self) -> None:
        self._checkpoint.check_floats()

    def read(self, key: str) -> np.ndarray:
        return self._checkpoint.read(self._stored[key])

    def rows(self, key: str, indices: np.ndarray) -> np.ndarray:
        return self._checkpoint.rows(self._stored[key], indices)


def rename(keys: Iterable[str], name_of: Callable[[str], str | None]) -> dict[str, str]:
    """The stored key of each name that `name_of` gives. Keys for which it gives None are left out. Raises
    UsageError if two keys get the same name.
    """
    stored: dict[str, str] = {}
    for key in sorted(keys):
        name = name_of(key)
        if name in stored:
            raise UsageError(f"{stored[name]} and {key} are two names of one tensor; keep one of them")
        if name is not None:
            stored[name] = key
    return stored
