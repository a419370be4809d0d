"""Reading the request that jaxspd stores in the files it writes. Does not import jax."""

import json
import os
from pathlib import Path
from typing import Any

from jaxspd.errors import UsageError
from jaxspd.files import parse_json
from jaxspd.request import METADATA_KEY


def read_request(path: Path) -> dict[str, Any]:
    """The request stored in a .png, .mp4 or .gif, or in a folder of frames. Raises UsageError without one."""
    file = path / "0000.png" if os.path.isdir(path) else path
    read = {".png": _png_text, ".mp4": _mp4_comment, ".gif": _gif_comment}.get(file.suffix.lower())
    foreign = UsageError(f"{path} was not written by jaxspd: it holds no parameters")
    if read is None or (file != path and not os.path.exists(file)):
        raise foreign
    try:
        text = read(file)
    except Exception as error:  # decoders raise exceptions of many kinds for damaged files
        line = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UsageError(f"cannot read the parameters in {file} ({line})") from None
    try:
        request = parse_json(text or "")
    except ValueError:  # another program's comment
        raise foreign from None
    if not isinstance(request, dict):
        raise foreign
    return request


def made_by(path: Path, request: dict[str, Any]) -> bool:
    """Whether the output at `path` exists and was made by exactly this `request`."""
    if not path.exists():
        return False
    try:
        return read_request(path) == json.loads(json.dumps(request))
    except UsageError:
        return False


def _png_text(path: Path) -> str | None:
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as image:
        return image.info.get(METADATA_KEY)


def _gif_comment(path: Path) -> str | None:
    from PIL import Image

    with Image.open(path, formats=["GIF"]) as image:
        return image.info.get("comment", b"").decode(errors="replace")


def _mp4_comment(path: Path) -> str | None:
    import av

    with path.open("rb") as file, av.open(file, format="mp4") as container:
        return container.metadata.get("comment")
