"""Reading the configuration files of a pipeline's components, with checks of types and ranges."""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from jaxspd.convert.checkpoint import read_json
from jaxspd.errors import UsageError

# These are far above any checkpoint's values, and low enough that building a model ends in time.
LARGEST, MOST_LAYERS = 2**20, 1000


def read_fields(path: Path, config_class: type) -> Any:
    """A `config_class`, a dataclass, with the fields that the JSON file `path` holds.

    Raises UsageError as `checked_fields` does.
    """
    return config_class(**checked_fields(path, read_json(path), config_class))


def checked_fields(path: Path, given: Mapping[str, Any], config_class: type) -> dict[str, Any]:
    """The values in `given`, the contents of the JSON file `path`, for the fields of a dataclass.

    Lists become tuples. Raises UsageError for a value that does not have its field's type. Integers must be
    from 1 to `LARGEST`, and numbers of layers from 0 to `MOST_LAYERS`. Other numbers must be finite, and
    lists must not be empty.
    """
    kinds, values = get_type_hints(config_class), {}
    for field in fields(config_class):
        if field.name not in given:
            continue
        name, value = field.name, given[field.name]
        values[name] = tuple(value) if isinstance(value, list) else value
        if not _fits(values[name], kinds[name], MOST_LAYERS if "layers" in name else LARGEST):
            raise wrong(path, name, value, _described(kinds[name]))
    return values


def check_options(
    path: Path,
    given: Mapping[str, Any],
    config_class: type,
    fixed: Mapping[str, Any],
    unread: Collection[str],
) -> None:
    """Raises UsageError for an unknown option in `given`, the contents of the JSON file `path`.

    Known options are the fields of `config_class`, the options in `fixed`, which must have the values given
    there, and those in `unread`, which do not change what is computed. Other options are allowed if they are
    null or false.
    """
    known = {*fixed, *unread, *(field.name for field in fields(config_class))}
    for name, value in given.items():
        if name in fixed and value != fixed[name]:
            raise wrong(path, name, value, json.dumps(fixed[name]))
        if name not in known and not name.startswith("_") and value not in (None, False):
            raise UsageError(f"{path}: {name} = {_short(value)} is not known; use a checkpoint without it")


def wrong(path: Path, name: str, value: Any, wanted: str) -> UsageError:
    return UsageError(f"{path}: {name} must be {wanted}, not {_short(value)}; download the file again")


def _short(value: Any) -> str:
    """`value` as JSON, cut after 40 characters."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _fits(value: Any, kind: Any, largest: int) -> bool:
    if NoneType in get_args(kind):
        return value is None or _fits(value, get_args(kind)[0], largest)
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        length = len(value) if isinstance(value, tuple) else 0
        kinds = kinds[:1] * length if kinds[1:] == (...,) else kinds
        return 0 < length == len(kinds) and all(map(_fits, value, kinds, [largest] * length))
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value) and abs(value) <= 1e30
    if kind is int:
        return type(value) is int and (0 if largest == MOST_LAYERS else 1) <= value <= largest
    return type(value) is kind


def _described(kind: Any) -> str:
    if NoneType in get_args(kind):
        return f"{_described(get_args(kind)[0])} or null"
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        length = "" if kinds[1:] == (...,) else f"{len(kinds)} "
        return f"a list of {length}values, each {_described(kinds[0])}"
    return {int: "a whole number in range", float: "a finite number", bool: "true or false", str: "text"}[
        kind
    ]
