"""The results of a call of the generator: the outputs, and the time and memory that they took."""

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
    """The progress of an output: the last finished `step` of its `plan`."""

    plan: Plan
    step: Step
    _look: Callable[[np.ndarray], np.ndarray]

    @property
    def grid(self) -> tuple[int, int]:
        """The grid `(h, w)` of the step's stage, in latents."""
        return self.plan.stages[self.step.stage].latent

    def due(self, looks: int) -> bool:
        """Whether to look at the output after this step, if there are to be `looks` looks.

        These steps are spread evenly, from the first step on. The last step is not among them, because it
        gives the output itself.
        """
        last = self.plan.steps - 1
        return self.step.number in np.linspace(0, last, looks + 1).round()[:-1]

    def preview(self) -> np.ndarray:
        """The predicted clean latents as pixels `[t, h, w, 3]`, uint8, one pixel for each latent.

        A picture has t = 1. `components.preview` makes the pixels, only when this is called.
        """
        return self._look(self.step.clean())


# Who is told of every step.
Watch = Callable[[Progress], Any]


@dataclass(frozen=True)
class Output:
    """One picture or video.

    `frames` are `[F, H, W, 3]`, uint8, with F = 1 for a picture. `request` is the complete request that
    repeats it. `path` is its file, or None if it was not written. `seconds` are those of `denoise` (a list,
    with one entry for each stage) and `decode`.
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
    """The pictures or videos of one call, and the time and memory that they took.

    - `frames` holds an array `[F, H, W, 3]`, uint8, for each output, with F = 1 for a picture.
    - `requests` holds each output's complete parameters, and `paths` the files that were written.
    - `plan` is the plan as `jaxspd plan --json` prints it.
    - `seconds` are those of `load`, `encode`, `compile` (the wait after everything else was ready), `denoise`
      (a list, with one entry for each stage, summed over outputs) and `decode`.
    - `programs` is the number of newly compiled step programs.
    - `peak_memory` is the peak in bytes of the process and, if the backend tells, of the device.
    - `resident` says which components stay in memory for the next call, on the "host" or the "device".
    - `skipped` are the files of outputs that existed already.
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
        paths: list[str | None] = [*map(str, self.paths)] or [None] * len(self.requests)
        outputs = [{"path": path, **request} for path, request in zip(paths, self.requests, strict=True)]
        return {"outputs": outputs, **values, "skipped": [str(path) for path in self.skipped]}


class Outputs(Iterator[Output]):
    """An iterator over the outputs of one call. Each is made and written when it is asked for.

    `result` says at any time what was made so far and what that took, without pixels. `asked` is the number
    of outputs of the request, skipped ones included. `paths` are the files that will be written.
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
        """Ends the run before the last output, and removes the progress bar."""
        self._made.close()

    def written(self) -> str:
        """A line for people that says how many of the outputs are on disk."""
        return written(self.result, self.asked)


def written(result: GenerationResult, asked: int) -> str:
    """A line for people that says how many of `asked` outputs are on disk."""
    count = len(result.paths) + len(result.skipped)
    if not count:
        return "no output is written"
    return f"{count} of {asked} outputs are written; skip_existing true goes on from there"


def peak_memory(device: jax.Device) -> dict[str, int]:
    """The peak bytes of this process ("host") and, if it tells, of `device` ("device")."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    on_device = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return peak | ({"device": on_device} if on_device else {})
