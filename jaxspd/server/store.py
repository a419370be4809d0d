"""Finished outputs in memory. Does not import jax."""

import secrets
from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class File:
    content: bytes
    media_type: str


def unguessable() -> str:
    """A new name, of letters, digits, - and _."""
    return secrets.token_urlsafe(16)


class Store:
    """Files by names that nobody can guess. Of more than `most` bytes in all, the oldest go."""

    def __init__(self, most: int):
        self.most, self.size = most, 0
        self._files: OrderedDict[str, File] = OrderedDict()

    def put(self, file: File) -> str:
        """The name under which `file` is kept."""
        name = unguessable()
        self._files[name] = file
        self.size += len(file.content)
        while self.size > self.most and len(self._files) > 1:
            self.drop(next(iter(self._files)))
        return name

    def get(self, name: str) -> File | None:
        return self._files.get(name)

    def drop(self, name: str) -> None:
        if file := self._files.pop(name, None):
            self.size -= len(file.content)
