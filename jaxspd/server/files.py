"""Encodes outputs as files in memory."""

import io
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxspd.media.output import poster_path, write_output, write_png
from jaxspd.results import Output
from jaxspd.server.store import File

# Names of parameters that hold places of weights.
PLACE = re.compile(r"_path(_\d+)?$")
MEDIA_TYPES = {"png": "image/png", "gif": "image/gif", "mp4": "video/mp4"}


def public(request: dict[str, Any]) -> dict[str, Any]:
    """The parameters that repeat an output, without paths on this machine. Hub ids stay."""
    return {name: value for name, value in request.items() if not (PLACE.search(name) and _local(value))}


def _local(value: str | list[str]) -> bool:
    """Whether `value` is a path on this machine or a list with one."""
    return any(os.path.isabs(one) for one in ([value] if isinstance(value, str) else value))


def png(pixels: np.ndarray, request: dict[str, Any] | None = None) -> bytes:
    """`pixels` `[H, W, 3]`, uint8, as a PNG file with `request` in its metadata."""
    file = io.BytesIO()
    write_png(file, pixels, json.dumps(request))
    return file.getvalue()


def encoded(output: Output) -> tuple[File, File | None]:
    """`output` as a file with its parameters, and the poster of a video; for a picture None."""
    kind, request = output.request["output_format"], public(output.request)
    if kind == "png":
        return File(png(output.frames[0], request), MEDIA_TYPES[kind]), None
    poster = File(png(output.frames[0], request), MEDIA_TYPES["png"])
    # A second pass moves an MP4's index to the front, for which the MP4 must be a file.
    with tempfile.TemporaryDirectory(prefix="jaxspd") as folder:
        path = Path(folder) / f"video.{kind}"
        write_output(path, output.frames, request, output.request["fps"])
        poster_path(path).unlink(missing_ok=True)
        return File(path.read_bytes(), MEDIA_TYPES[kind]), poster
