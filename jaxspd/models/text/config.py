"""Reading the configurations of text encoders."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def pick(config_class: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a dataclass's fields that `given` holds."""
    return {field.name: given[field.name] for field in fields(config_class) if field.name in given}
