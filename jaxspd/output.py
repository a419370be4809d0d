"""Pictures and videos on disk: whole or not at all, with their parameters inside."""

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from jaxspd.errors import UsageError
from jaxspd.params import METADATA_KEY
from jaxspd.video import write_gif, write_mp4

# "frames" is a folder of PNGs, the others are files ending so.
FORMATS = ("png", "mp4", "gif", "frames")


def output_format(asked: str | None, name: str | None, frames: int) -> str:
    """The format of an output of so many frames: as `asked`, else as the file name ends, else PNG for a
    picture and MP4 for a video. UsageError if these clash.
    """
    if asked is not None and asked not in FORMATS:
        raise UsageError(f"unknown output_format {asked!r}; use one of {', '.join(FORMATS)}")
    ending = Path(name or "").suffix
    by_name = ending.lower()[1:]
    if ending and (by_name == "frames" or by_name not in FORMATS):
        raise UsageError(f"{name!r} ends in {ending}; end it in .png, .mp4 or .gif, or leave the ending out")
    if asked and ending and asked != by_name:
        raise UsageError(f"{name!r} is no name for {asked}; leave {ending} out or change output_format")
    kind = asked or by_name or ("png" if frames == 1 else "mp4")
    if kind == "png" and frames > 1:
        raise UsageError(f"a PNG cannot hold a video of {frames} frames; write mp4, gif or frames")
    if kind in ("mp4", "gif") and frames == 1:
        raise UsageError(f"a single frame is a picture; write png instead of {kind}")
    return kind


def output_paths(folder: str, name: str | None, requests: list[dict[str, Any]], kind: str) -> list[Path]:
    """Where each request's output goes, in the format `kind`.

    Without `name` an output is called after prompt, seed and a hash of the request, so that the same
    request gives the same file and another never overwrites it.
    """
    suffix = "" if kind == "frames" else f".{kind}"
    if name is None:
        return [Path(folder) / (_default_name(request) + suffix) for request in requests]
    path = Path(name)
    if not name or path.name != name or name == "..":
        raise UsageError(f"output_file_name must be a plain file name, not {name!r}")
    if len(requests) == 1:
        return [Path(folder) / f"{path.stem}{suffix}"]
    return [Path(folder) / f"{path.stem}_{i}{suffix}" for i in range(len(requests))]


def _default_name(request: dict[str, Any]) -> str:
    slug = re.sub(r"[^\w]+", "-", request["prompt"].lower()).strip("-")[:60].strip("-")
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:8]
    return f"{slug or 'picture'}_{request['seed']}_{digest}"


def poster_path(path: Path) -> Path:
    """Where the first frame of the MP4 at `path` is kept as a picture."""
    return path.with_suffix(".png")


def check_writable(paths: list[Path]) -> None:
    """UsageError unless every path, and every MP4's poster, can be written; creates nothing."""
    for path in paths + [poster_path(path) for path in paths if path.suffix == ".mp4"]:
        if len(os.fsencode(path.name)) > 255:
            raise UsageError(f"{path.name} is too long for a file name; choose a shorter --output-file-name")
        parent = path.parent.absolute()
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise UsageError(f"{parent} is a file, not a folder; choose another --output-path")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"{parent} cannot be written; choose another --output-path")
        if path.suffix:
            if path.is_dir():
                raise UsageError(f"{path} is a folder; choose another --output-file-name")
        elif path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UsageError(f"{path} exists already; choose another --output-file-name for the frames")


def write_output(path: Path, frames: np.ndarray, request: dict[str, Any], fps: float | None = None) -> None:
    """Writes frames [F, H, W, 3], uint8, with `request` in the metadata.

    The format goes by the path: .png the only frame, .mp4 and .gif a video at `fps`, without an ending a
    folder with a PNG of each frame. An MP4's first frame is written too, to its `poster_path`. All is
    written in a folder beside the target first, then renamed.
    """
    text = json.dumps(request)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Removed in the end whatever happens: an interrupt too leaves nothing behind.
        with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=path.parent) as folder:
            part = Path(folder) / path.name
            if path.suffix == ".png":
                _write_png(part, frames[0], text)
            elif path.suffix == ".gif":
                write_gif(part, frames, fps, text)
            elif path.suffix == ".mp4":
                write_mp4(part, frames, fps, text)
                _write_png(poster_path(part), frames[0], text)
                os.replace(poster_path(part), poster_path(path))
            else:
                part.mkdir()
                for number, pixels in enumerate(frames):
                    _write_png(part / f"{number:04d}.png", pixels, text)
            os.replace(part, path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror or error})") from None


def _write_png(path: Path, pixels: np.ndarray, text: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(METADATA_KEY, text)
    Image.fromarray(pixels).save(path, "PNG", pnginfo=info)
