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
    """Where LoRAs lie, named so that the same files are found from elsewhere, and their strengths."""

    paths: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()

    @classmethod
    def of(cls, paths: Paths = None, scales: Scales = None) -> "Loras":
        """One or several, each with a strength, or none for 1 each; UsageError for another number of them."""
        paths = [lasting(path) for path in _several("lora_path", paths, str | os.PathLike, "text")]
        given = _several("lora_scale", scales, int | float, "a number, or several")
        if given and not paths:
            raise UsageError("lora_scale needs a lora_path; give one or leave it out")
        if given and len(given) != len(paths):
            raise UsageError(
                f"{len(given)} lora_scale for {len(paths)} lora_path; give one for each, or none for 1 each"
            )
        return cls(tuple(paths), tuple(map(float, given or [1.0] * len(paths))))

    def open(self) -> list[tuple[LoraFile, float]]:
        """The files, which come from the hub where they must, and their strengths."""
        return [
            (LoraFile(fetch_file(path)), scale) for path, scale in zip(self.paths, self.scales, strict=True)
        ]

    @property
    def report(self) -> dict[str, list]:
        """What of them stands in an output's parameters."""
        return {"lora_path": [*self.paths], "lora_scale": [*self.scales]} if self.paths else {}


def lasting(given: str | os.PathLike) -> str:
    """A file's path made absolute, a hub id as it is."""
    path = user_path(given)
    return str(path.absolute()) if os.path.exists(path) else os.fspath(given)


def _several(name: str, given: Any, kind: Any, called: str) -> list:
    """`given` as a list of `kind`, None being an empty one."""
    items = [*given] if isinstance(given, list | tuple) else [] if given is None else [given]
    if not all(isinstance(item, kind) and not isinstance(item, bool) for item in items):
        raise UsageError(f"{name} must be {called}")
    return items
