"""Configuration files of a pipeline's components: what is read of them has the type and range it needs."""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from jaxspd.convert.checkpoint import read_json
from jaxspd.errors import UsageError

# Far above any checkpoint's, and low enough that nothing built of them is endless.
LARGEST, MOST_LAYERS = 2**20, 1000


def read_fields(path: Path, config_class: type) -> Any:
    """`config_class`, a dataclass, with those of its fields that the JSON file `path` holds: see
    `checked_fields`.
    """
    return config_class(**checked_fields(path, read_json(path), config_class))


def checked_fields(path: Path, given: Mapping[str, Any], config_class: type) -> dict[str, Any]:
    """Those of a dataclass's fields that `given`, which the JSON file `path` holds, names; lists are tuples.

    UsageError for a value of another type than the field's; whole numbers are 1 to `LARGEST`, numbers of
    layers 0 to `MOST_LAYERS`, other numbers finite, lists not empty.
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
    """UsageError for an option in `given`, which the JSON file `path` holds, that changes what is computed
    and is not known.

    `fixed` are options that only one value is understood of, `unread` those that change nothing here. Another
    option than these and the fields of `config_class` may stand there as long as it is off.
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
    """`value` as the file has it, of what is long only the beginning."""
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
