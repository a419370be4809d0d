"""Pictures on disk: whole or not at all, with their parameters inside."""

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from jaxspd.errors import UsageError
from jaxspd.params import METADATA_KEY


def picture_paths(folder: str, name: str | None, requests: list[dict[str, Any]]) -> list[Path]:
    """Where each request's picture goes.

    Without `name` a file is called after prompt, seed and a hash of the request, so that the same
    request gives the same file and another never overwrites it.
    """
    if name is None:
        return [Path(folder) / _default_name(request) for request in requests]
    path = Path(name)
    if path.name != name:
        raise UsageError(f"output_file_name must be a plain file name, not {name!r}")
    if path.suffix.lower() not in ("", ".png"):
        raise UsageError(f"pictures are written as PNG; end {name!r} in .png")
    if len(requests) == 1:
        return [Path(folder) / f"{path.stem}.png"]
    return [Path(folder) / f"{path.stem}_{i}.png" for i in range(len(requests))]


def _default_name(request: dict[str, Any]) -> str:
    slug = re.sub(r"[^\w]+", "-", request["prompt"].lower()).strip("-")[:60].strip("-")
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:8]
    return f"{slug or 'picture'}_{request['seed']}_{digest}.png"


def check_writable(paths: list[Path]) -> None:
    """UsageError unless every path can be written; creates nothing."""
    for path in paths:
        if path.is_dir():
            raise UsageError(f"{path} is a folder; choose another --output-file-name")
        parent = path.parent.absolute()
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise UsageError(f"{parent} is a file, not a folder; choose another --output-path")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"{parent} cannot be written; choose another --output-path")


def write_png(path: Path, picture: Image.Image, request: dict[str, Any]) -> None:
    """Writes `picture` with `request` in its metadata: beside its target first, then renamed."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps(request))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(suffix=".part", dir=path.parent)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror})") from None
    try:
        with os.fdopen(handle, "wb") as file:
            picture.save(file, "PNG", pnginfo=info)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:  # an interrupt too leaves nothing behind
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UsageError(f"{path} cannot be written ({error.strerror})") from None
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
