"""Paths and text files that a user gives: one clear line for what is no such thing. Does not import jax."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxspd.errors import UsageError


def is_text(value: str) -> bool:
    """Whether `value` is Unicode text; bytes that are no UTF-8, and halves of a surrogate pair, are none."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def user_path(given: str | os.PathLike) -> Path:
    """The path that a user means, with `~` expanded; UsageError for what can be none."""
    text = os.fspath(given)
    if not text or "\0" in text or not is_text(text):
        raise UsageError(f"{text!r} is no path; give one without NUL characters, in UTF-8")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UsageError(f"the home folder in {text} is not known; give the whole path") from None


def lasting_model_path(given: str | os.PathLike | None) -> str | None:
    """`given` as it still names the same model elsewhere: a local folder absolute, a hub id as it is."""
    if given is None:
        return None
    folder = user_path(given)
    return str(folder.absolute()) if os.path.isdir(folder) else os.fspath(given)


def lasting_path(given: str | os.PathLike | None) -> str | None:
    """`given` as it still names the same file elsewhere."""
    return None if given is None else str(user_path(given).absolute())


def read_text(given: str | os.PathLike, what: str) -> str:
    """The text of a UTF-8 file, without the byte order mark that some editors put first.

    UsageError says that it cannot read `what`, such as "prompts from", and why.
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
    if "\0" in text:  # which UTF-16 is full of, and text has no use for
        raise UsageError(f"cannot read {what} {path} (it is no UTF-8 text); save it as UTF-8")
    return text


def parse_json(text: str) -> Any:
    """What a JSON text says; ValueError for what is none: NaN and Infinity are not, nor keys given twice."""
    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def unique(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """A dictionary of `pairs`; ValueError for a key given twice."""
    values = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"it gives {key!r} twice")
        values[key] = value
    return values


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")
