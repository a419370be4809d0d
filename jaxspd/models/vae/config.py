"""Reading `vae/config.json`: what changes the computation is known or refused."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from jaxspd.errors import UsageError

Config = TypeVar("Config")


def read(
    config_class: type[Config], given: Mapping[str, Any], fixed: Mapping[str, Any], unread: tuple[str, ...]
) -> Config:
    """`config_class` with what `given` says of its fields, each in the type of its default.

    `fixed` are options that only one value is understood of, `unread` those that change nothing here. An
    option that nobody knows may stand there as long as it is off. UsageError says what cannot be read.
    """
    known = {field.name: field for field in fields(config_class)}
    values = {name: _typed(field, given[name]) for name, field in known.items() if name in given}
    for name, value in given.items():
        if name in fixed and value != fixed[name]:
            raise UsageError(f"vae/config.json: {name} must be {fixed[name]!r}, not {value!r}")
        if name not in {*known, *fixed, *unread} and not name.startswith("_") and value not in (None, False):
            raise UsageError(f"vae/config.json: {name} = {value!r} is not known; use a checkpoint without it")
    return config_class(**values)


def _typed(field, value: Any) -> Any:
    """`value` in the manner of the field's default: a tuple of its kind, a number, or a truth."""
    default = field.default if field.default is not MISSING else None
    if value is None and default is None:
        return None
    example = field.metadata.get("example", default)
    many = isinstance(example, tuple)
    kind = type(example[0]) if many else type(example)
    values = value if many and isinstance(value, list | tuple) else (value,)
    if many != isinstance(value, list | tuple) or not all(_is(kind, one) for one in values):
        wanted = {bool: "true or false", int: "a positive whole number", float: "a number"}[kind]
        wanted = f"a list, each {wanted}" if many else wanted
        raise UsageError(f"vae/config.json: {field.name} must be {wanted}, not {value!r}")
    return tuple(map(kind, values)) if many else kind(value)


def _is(kind: type, value: Any) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and value > 0
    return isinstance(value, int | float)
