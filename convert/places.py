"""Checks whether something new can be made at a path, before the work whose result goes there."""

import os
from contextlib import suppress
from pathlib import Path

from .errors import UsageError

# A stand-in for the name of a temporary folder beside the target, and one for the names of files below it.
TEMPORARY, BELOW = ".12345678.part", "x" * 200


def check_place(path: Path, cure: str) -> None:
    """Raises UsageError, ending in `cure`, unless a file or a folder can be made at `path`. Creates nothing.

    Folders above it may be missing. It is no error if something exists there.
    """
    try:
        whole = path.absolute()
        if whole.name in ("", ".."):
            raise UsageError(f"{path} names nothing new; {cure}")
        parent = whole.parent
        while not os.path.lexists(parent):
            parent = parent.parent
        if not os.path.isdir(parent):
            what = "a link to nowhere" if parent.is_symlink() and not parent.exists() else "a file"
            raise UsageError(f"{parent} is {what}, not a folder; {cure}")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"{parent} cannot be written; {cure}")
        # The system itself says which names and paths are too long. Each name is looked up in an existing
        # folder, because a lookup stops at the first name that is missing.
        names = [parent / name for name in whole.relative_to(parent).parts]
        for entry in [*names, whole.parent / TEMPORARY / whole.name / BELOW]:
            with suppress(FileNotFoundError):
                os.lstat(entry)
    except OSError as error:  # the current folder is gone, a name is too long, or the disk is broken
        raise UsageError(f"{path} cannot be written ({error.strerror}); {cure}") from None


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path`, which need not exist, is or lies in `folder`, or in a folder to which an entry of
    `folder` links. Links are followed.
    """
    above = [place for place in (path, *path.resolve().parents) if place.exists()]
    inside = [folder, *(entry for entry in folder.iterdir() if entry.is_dir())]
    return any(os.path.samefile(place, part) for place in above for part in inside)
