"""How a picture grew: the looks taken at it while it was made, as a strip or an animation."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from jaxspd.errors import UsageError
from jaxspd.media.output import check_writable, whole, write_png
from jaxspd.results import Output, Progress

KINDS = {"strip": ".png", "gif": ".gif"}
# Looks that are taken at each output, beside the finished one.
LOOKS = 8
# A strip is no higher, so that nine pictures of 1024 pixels stay a strip to be looked at.
STRIP_HEIGHT = 256
# Of the animation: looks a second, and how many looks long the finished picture stays.
RATE, LAST = 4, 8


class Growth:
    """What `DiffGenerator.iterate` is to `watch`, so that `write` can show how each output grew. `kind` is
    `strip`, a PNG with the looks in a row, or `gif`. Of a video it shows the middle frame.
    """

    def __init__(self, kind: str):
        if kind not in KINDS:
            raise UsageError(f"unknown preview {kind!r}; use {' or '.join(KINDS)}")
        self.kind, self._looks = kind, []

    def __call__(self, progress: Progress) -> None:
        if progress.due(LOOKS):
            self._looks.append(_middle(progress.preview()))

    def path(self, output: Path) -> Path:
        """Where the growth of what is written to `output` goes: no other output of the same name does."""
        return output.with_name(f"{output.stem}.growth{KINDS[self.kind]}")

    def check(self, outputs: list[Path]) -> None:
        """UsageError unless the growth of all `outputs` can be written; creates nothing."""
        check_writable([self.path(output) for output in outputs])

    def write(self, output: Output) -> Path:
        """Writes how `output`, the last one made, grew; returns where to."""
        path, last, text = self.path(output.path), _middle(output.frames), json.dumps(output.request)
        height, width, _ = last.shape
        looks, self._looks = [*self._looks, last], []
        with whole(path) as part:
            if self.kind == "strip":
                size = min(height, STRIP_HEIGHT)
                row = [_resized(look, size, round(width * size / height)) for look in looks]
                write_png(part, np.concatenate(row, axis=1), text)
            else:
                from jaxspd.media.video import write_gif

                frames = [_resized(look, height, width) for look in looks]
                write_gif(part, np.stack(frames + frames[-1:] * (LAST - 1)), RATE, text)
        return path


def _middle(frames: np.ndarray) -> np.ndarray:
    return frames[len(frames) // 2]


def _resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """`pixels` in that size: where they are fewer, as squares, so that the grid is seen to grow."""
    way = Image.Resampling.NEAREST if height > len(pixels) else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(pixels).resize((width, height), way))
