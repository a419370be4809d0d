"""Writing pictures and videos, whole or not at all, with their parameters inside."""

import hashlib
import json
import os
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, PngImagePlugin

from jaxspd.convert.places import check_place
from jaxspd.errors import UsageError
from jaxspd.files import user_path
from jaxspd.request import METADATA_KEY

# "frames" is a folder of PNGs. The others are files with that ending.
FORMATS = ("png", "mp4", "gif", "frames")
# How many of a name's 255 bytes are for the prompt. Seed, hash, endings and numbers follow it.
SLUG_BYTES = 180


def output_format(asked: str | None, name: str | None, frames: int) -> str:
    """The format of an output of `frames` frames.

    It is `asked`, or else the ending of the file `name`, or else PNG for a picture and MP4 for a video.
    Raises UsageError for an unknown format or ending, and if these or the number of frames clash.
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
    """The path of each request's output in `folder`, in the format `kind`.

    Without `name` an output is named after its prompt, seed and a hash of its request. So the same request
    gives the same file, and another request never overwrites it. Of equal requests, all but the first are
    numbered. With `name`, several outputs are numbered from 0.
    """
    place, suffix = user_path(folder), "" if kind == "frames" else f".{kind}"
    if name is None:
        seen: Counter[str] = Counter()
        names = []
        for stem in map(_default_name, requests):
            seen[stem] += 1
            names.append(stem if seen[stem] == 1 else f"{stem}_{seen[stem]}")
    else:
        stem = _given_stem(name)
        names = [stem] if len(requests) == 1 else [f"{stem}_{i}" for i in range(len(requests))]
    return [place / f"{name}{suffix}" for name in names]


def _given_stem(name: str) -> str:
    """A user's file name without its ending. Raises UsageError if it is not a plain file name."""
    path = Path(name)
    unprintable = any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in name)
    if not name or path.name != name or name == ".." or unprintable:
        raise UsageError(f"output_file_name must be a plain file name, not {name!r}")
    if name.lower() in [f".{kind}" for kind in FORMATS]:
        raise UsageError(f"{name!r} is only an ending; put a name before it")
    return path.stem


def _default_name(request: dict[str, Any]) -> str:
    # NFC composes letters; `\W` would match a combining mark by itself.
    slug = re.sub(r"\W+", "-", unicodedata.normalize("NFC", request["prompt"].lower()))
    slug = slug.strip("-")[:60].encode()[:SLUG_BYTES].decode(errors="ignore").strip("-")
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:8]
    return f"{slug or 'picture'}_{request['seed']}_{digest}"


def poster_path(path: Path) -> Path:
    """Where the first frame of the MP4 at `path` is kept. No other output of that name goes there."""
    return path.with_suffix(".poster.png")


def check_writable(paths: list[Path]) -> None:
    """Raises UsageError unless every path, and every MP4's poster, can be written. Creates nothing."""
    for path in paths + [poster_path(path) for path in paths if path.suffix == ".mp4"]:
        check_place(path, "choose another output_path or output_file_name")
        if path.suffix:
            if os.path.isdir(path):
                raise UsageError(f"{path} is a folder; choose another output_file_name")
        elif os.path.lexists(path) and not _is_empty_folder(path):
            raise UsageError(f"{path} exists already; choose another output_file_name for the frames")


def _is_empty_folder(path: Path) -> bool:
    """Whether `path` is an empty folder, which a folder of frames can replace."""
    try:
        return not path.is_symlink() and not os.listdir(path)
    except OSError:  # a file, or a folder that cannot be read
        return False


def write_output(path: Path, frames: np.ndarray, request: dict[str, Any], fps: float | None = None) -> None:
    """Writes frames `[F, H, W, 3]`, uint8, to `path`, with `request` in the metadata.

    The path's ending chooses the format. A .png holds the only frame, an .mp4 or .gif a video at `fps` frames
    per second. A path without an ending is a folder with a PNG for each frame. An MP4's first frame is also
    written, to its `poster_path`. Everything is written beside the target first, then renamed. Raises
    UsageError if that fails.
    """
    text = json.dumps(request)
    with whole(path) as part:
        if path.suffix == ".png":
            write_png(part, frames[0], text)
        elif path.suffix in (".gif", ".mp4"):
            assert fps is not None, "a video has a frame rate"
            _write_video(path, part, frames, fps, text)
        else:
            part.mkdir()
            for number, pixels in enumerate(frames):
                write_png(part / f"{number:04d}.png", pixels, text)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A context with a temporary path beside `path`, which is renamed to `path` at the end.

    So the target appears whole or not at all. Raises UsageError if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The folder is removed whatever happens, so an interrupt leaves nothing behind either.
        with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=path.parent) as folder:
            part = Path(folder) / path.name
            yield part
            os.replace(part, path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror or error})") from None


def _write_video(path: Path, part: Path, frames: np.ndarray, fps: float, text: str) -> None:
    """Writes `part`, and for an MP4 its poster beside `path`."""
    from jaxspd.media.video import write_gif, write_mp4  # pictures need no encoders

    if path.suffix == ".gif":
        write_gif(part, frames, fps, text)
        return
    write_mp4(part, frames, fps, text)
    write_png(poster_path(part), frames[0], text)
    os.replace(poster_path(part), poster_path(path))


def write_png(path: Path | BinaryIO, pixels: np.ndarray, text: str) -> None:
    """Writes `pixels` `[H, W, 3]`, uint8, with `text` inside."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(METADATA_KEY, text)
    # Pillow's default level, 6, takes three times as long and saves a tenth of the size.
    Image.fromarray(pixels).save(path, "PNG", pnginfo=info, compress_level=3)
