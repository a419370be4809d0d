"""Whether something new can be put at a path, asked before the work whose result goes there."""

import os
from contextlib import suppress
from pathlib import Path

from .errors import UsageError

# Stand for a temporary folder beside the target, which has a name of its own, and for what lies below it.
TEMPORARY, BELOW = ".12345678.part", "x" * 200


def check_place(path: Path, cure: str) -> None:
    """UsageError, ending in `cure`, unless a file or a folder can be made at `path`; creates nothing.

    Folders above it may be missing. That something is there already is no error here.
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
        # The system itself says which names and paths are too long for it: each name in a folder that
        # exists, as it looks up names one by one and stops at the first that is missing.
        names = [parent / name for name in whole.relative_to(parent).parts]
        for entry in [*names, whole.parent / TEMPORARY / whole.name / BELOW]:
            with suppress(FileNotFoundError):
                os.lstat(entry)
    except OSError as error:  # no current folder any more, too long a name, or a broken disk
        raise UsageError(f"{path} cannot be written ({error.strerror}); {cure}") from None


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path`, which need not exist, lies in `folder` or in a folder that `folder` has links to, or is
    one of these, by whatever name.
    """
    above = [place for place in (path, *path.resolve().parents) if place.exists()]
    inside = [folder, *(entry for entry in folder.iterdir() if entry.is_dir())]
    return any(os.path.samefile(place, part) for place in above for part in inside)
