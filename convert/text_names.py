"""The names of text encoders' tensors, which differ from file to file, made those that the tables know."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from .checkpoint import Checkpoint
from .errors import UsageError


class Renamed:
    """The tensors of `checkpoint` that a text encoder reads, by the names that its table knows.

    `names_of` finds these among the stored keys, as the functions `names` of the tables do.
    """

    config = Checkpoint.config

    def __init__(self, checkpoint: Checkpoint, names_of: Callable[[set[str]], Mapping[str, str]]):
        """UsageError if two stored tensors are one and the same."""
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
    """Stored keys by the names that `name_of` gives them; None leaves a key out."""
    stored = {}
    for key in sorted(keys):
        name = name_of(key)
        if name in stored:
            raise UsageError(f"{stored[name]} and {key} are two names of one tensor; keep one of them")
        if name is not None:
            stored[name] = key
    return stored
