"""What a call of the generator gives: outputs one by one, and what making them took."""

import resource
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from jaxspd.sampling.loop import Step
from jaxspd.spectral.plan import Plan


@dataclass(frozen=True)
class Progress:
    """How far an output is: the last `step` done of `plan`."""

    plan: Plan
    step: Step
    _look: Callable[[np.ndarray], np.ndarray]

    @property
    def grid(self) -> tuple[int, int]:
        """The stage's grid, (h, w) in latents."""
        return self.plan.stages[self.step.stage].latent

    def due(self, looks: int) -> bool:
        """Whether this step is one of so many after which to look: evenly spread, from the first on, without
        the last, which comes to the output itself.
        """
        last = self.plan.steps - 1
        return self.step.number in np.linspace(0, last, looks + 1).round()[:-1]

    def preview(self) -> np.ndarray:
        """Where the output is heading: pixels `[t, h, w, 3]`, uint8, of its predicted clean latents, one
        each; a picture's t is 1. `components.preview` says how. Costs nothing unless it is called.
        """
        return self._look(self.step.clean())


# Who is told of every step.
Watch = Callable[[Progress], None]


@dataclass(frozen=True)
class Output:
    """One picture or video: `frames` `[F, H, W, 3]`, uint8, a picture's F being 1; the complete `request`
    that repeats it; the `path` it was written to, if it was; and the `seconds` of `denoise` (a list, one
    entry a stage) and `decode`.
    """

    frames: np.ndarray
    request: dict[str, Any]
    path: Path | None
    seconds: dict[str, Any]

    @property
    def image(self) -> Image.Image:
        """The picture, or the video's first frame."""
        return Image.fromarray(self.frames[0])


@dataclass
class GenerationResult:
    """Pictures or videos of one call, and what making them took.

    `frames` holds an array `[F, H, W, 3]`, uint8, for each output, a picture's F being 1, and `requests`
    its complete parameters; `seconds` the time of `compile` (waiting for it after everything else was
    ready), `load`, `encode`, `denoise` (a list, one entry a stage, summed over outputs) and `decode`;
    `programs` the step programs newly compiled; `peak_memory` the process's and, where the backend
    tells, the device's peak in bytes; `resident` the components that stay in memory for the next call, and
    whether on the "host" or the "device"; `skipped` the outputs that existed already.
    """

    frames: list[np.ndarray]
    requests: list[dict[str, Any]]
    plan: dict[str, Any]
    seconds: dict[str, Any]
    programs: int
    peak_memory: dict[str, int]
    paths: list[Path] = field(default_factory=list)
    resident: dict[str, str] = field(default_factory=dict)
    skipped: list[Path] = field(default_factory=list)

    @property
    def images(self) -> list[Image.Image]:
        """The pictures, or the videos' first frames."""
        return [Image.fromarray(frames[0]) for frames in self.frames]

    def report(self) -> dict[str, Any]:
        """Everything but the pixels, for JSON."""
        values = {k: v for k, v in vars(self).items() if k not in ("frames", "requests", "paths")}
        outputs = [
            {"path": str(path), **request}
            for path, request in zip(self.paths or [None] * len(self.requests), self.requests, strict=True)
        ]
        return {"outputs": outputs, **values, "skipped": [str(path) for path in self.skipped]}


class Outputs(Iterator[Output]):
    """Outputs of one call, each made when it is asked for, and written before it is given.

    `result` tells at any time what was made so far and what that took, without pixels. `asked` is how many
    outputs the request has, those that are skipped included; `paths` are those that will be written.
    """

    def __init__(
        self,
        result: GenerationResult,
        asked: int,
        paths: list[Path],
        made: Generator[Output, None, None],
    ):
        self.result, self.asked, self.paths, self._made = result, asked, paths, made

    def __next__(self) -> Output:
        return next(self._made)

    def close(self) -> None:
        """Makes no more, and takes the progress bar away: for who stops before the end."""
        self._made.close()

    def written(self) -> str:
        """How many of the outputs asked for are on disk, for people."""
        return written(self.result, self.asked)


def written(result: GenerationResult, asked: int) -> str:
    """How many of the outputs asked for are on disk, for people."""
    count = len(result.paths) + len(result.skipped)
    if not count:
        return "no output is written"
    return f"{count} of {asked} outputs are written; skip_existing true goes on from there"


def peak_memory(device: jax.Device) -> dict[str, int]:
    """Peak bytes of this process and, where it tells, of `device`."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    on_device = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return peak | ({"device": on_device} if on_device else {})
