"""Paths and text files that a user gives, with one clear line for bad ones. Does not import jax."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxspd.errors import UsageError


def is_text(value: str) -> bool:
    """Whether `value` is Unicode text, without bytes that are not UTF-8 and without lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def user_path(given: str | os.PathLike) -> Path:
    """The path that a user gives, with `~` expanded. Raises UsageError if it cannot be a path."""
    text = os.fspath(given)
    if not text or "\0" in text or not is_text(text):
        raise UsageError(f"{text!r} is no path; give one without NUL characters, in UTF-8")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UsageError(f"the home folder in {text} is not known; give the whole path") from None


def lasting_model_path(given: str | os.PathLike | None) -> str | None:
    """A name of the same model from any folder: a local folder's absolute path, or a hub id as it is."""
    if given is None:
        return None
    folder = user_path(given)
    return str(folder.absolute()) if os.path.isdir(folder) else os.fspath(given)


def lasting_path(given: str | os.PathLike | None) -> str | None:
    """The absolute path of a file, or None if none is given."""
    return None if given is None else str(user_path(given).absolute())


def read_text(given: str | os.PathLike, what: str) -> str:
    """The text of a UTF-8 file, without the byte order mark that some editors put first.

    Raises UsageError, with `what`, such as "prompts from", in its message, if the file cannot be read.
    """
    path = user_path(given)
    if os.path.isdir(path):
        raise UsageError(f"cannot read {what} {path} (it is a folder); give a file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read {what} {path} ({error.strerror})") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 is full of NUL, and text needs none
        raise UsageError(f"cannot read {what} {path} (it is no UTF-8 text); save it as UTF-8")
    return text


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for other text, NaN, Infinity, and a repeated key."""
    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def unique(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """A dictionary of `pairs`. Raises ValueError for a key given twice."""
    values = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"it gives {key!r} twice")
        values[key] = value
    return values


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")
