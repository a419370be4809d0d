"""LoRAs as users name them: files or hub ids, each with its strength."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxspd.convert.lora_file import LoraFile
from jaxspd.errors import UsageError
from jaxspd.files import user_path
from jaxspd.hub import fetch_file

Paths = str | os.PathLike | Sequence[str | os.PathLike] | None
Scales = float | Sequence[float] | None


@dataclass(frozen=True)
class Loras:
    """The paths of LoRAs, absolute or hub ids, and their strengths."""

    paths: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()
    which: str = ""

    @classmethod
    def of(cls, paths: Paths = None, scales: Scales = None, which: str = "") -> "Loras":
        """LoRAs from one path or several, with a strength for each. Without strengths, each has 1.

        `which` ends the options' names: "_2" for the second of two transformers. Raises UsageError for
        another number of strengths, and for values of the wrong type.
        """
        path_name, scale_name = f"lora_path{which}", f"lora_scale{which}"
        named = [lasting(path) for path in _several(path_name, paths, str | os.PathLike, "text")]
        given = _several(scale_name, scales, int | float, "a number, or several")
        if given and not named:
            raise UsageError(f"{scale_name} needs a {path_name}; give one or leave it out")
        if given and len(given) != len(named):
            numbers = f"{len(given)} {scale_name} for {len(named)} {path_name}"
            raise UsageError(f"{numbers}; give one for each, or none for 1 each")
        return cls(tuple(named), tuple(map(float, given or [1.0] * len(named))), which)

    def open(self) -> list[tuple[LoraFile, float]]:
        """The files, downloaded from the hub if need be, and their strengths."""
        return [
            (LoraFile(fetch_file(path)), scale) for path, scale in zip(self.paths, self.scales, strict=True)
        ]

    @property
    def report(self) -> dict[str, list]:
        """The LoRAs' entries in an output's parameters."""
        if not self.paths:
            return {}
        return {f"lora_path{self.which}": [*self.paths], f"lora_scale{self.which}": [*self.scales]}


def of_each(family, first: Loras, second: Loras) -> list[Loras]:
    """The LoRAs of each of the family's transformers.

    Raises UsageError for LoRAs of a second transformer if there is only one.
    """
    if len(family.transformers) == 1 and second.paths:
        raise UsageError(f"{family.title} has one transformer; leave lora_path_2 out")
    return [first, second][: len(family.transformers)]


def lasting(given: str | os.PathLike) -> str:
    """The absolute path of an existing file, or a hub id as it is."""
    path = user_path(given)
    return str(path.absolute()) if os.path.exists(path) else os.fspath(given)


def _several(name: str, given: Any, kind: Any, called: str) -> list:
    """`given` as a list of `kind`. None becomes an empty list. Raises UsageError for other types."""
    items = [*given] if isinstance(given, list | tuple) else [] if given is None else [given]
    if not all(isinstance(item, kind) and not isinstance(item, bool) for item in items):
        raise UsageError(f"{name} must be {called}")
    return items
