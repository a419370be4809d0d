"""Keeps finished outputs in memory. Does not import jax."""

import secrets
from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class File:
    content: bytes
    media_type: str


class Store:
    """Files by names that nobody can guess and that begin with `prefix`. When there are more than `most`
    bytes in all, the oldest files are dropped.
    """

    def __init__(self, most: int, prefix: str = ""):
        self.most, self.size, self._prefix = most, 0, prefix
        self._files: OrderedDict[str, File] = OrderedDict()

    def put(self, file: File) -> str:
        """Keeps `file` and returns its name."""
        name = self.name()
        self._files[name] = file
        self.size += len(file.content)
        while self.size > self.most and len(self._files) > 1:
            self.drop(next(iter(self._files)))
        return name

    def name(self) -> str:
        """A new name of letters, digits, - and _, after the prefix."""
        return self._prefix + secrets.token_urlsafe(16)

    def get(self, name: str) -> File | None:
        return self._files.get(name)

    def drop(self, name: str) -> None:
        if file := self._files.pop(name, None):
            self.size -= len(file.content)
