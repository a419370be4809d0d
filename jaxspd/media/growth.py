"""How a picture grew: previews taken while it was made, as a strip or an animation."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from jaxspd.errors import UsageError
from jaxspd.media.output import check_writable, whole, write_png
from jaxspd.results import Output, Progress

KINDS = {"strip": ".png", "gif": ".gif"}
# How many previews are taken of each output, beside the finished one.
LOOKS = 8
# A strip's largest height in pixels, so that nine pictures of 1024 pixels fit on a screen.
STRIP_HEIGHT = 256
# The animation's frames a second, and for how many frames the finished picture stays.
RATE, LAST = 4, 8


class Growth:
    """Collects previews of each output while it is made, and writes them as one file.

    Pass it to `DiffGenerator.iterate` as `watch`, and call `write` with each output. `kind` is `strip`, a PNG
    with the previews in a row, or `gif`. A video's middle frame is shown. Raises UsageError for another kind.
    """

    def __init__(self, kind: str):
        if kind not in KINDS:
            raise UsageError(f"unknown preview {kind!r}; use {' or '.join(KINDS)}")
        self.kind = kind
        self._looks: list[np.ndarray] = []

    def __call__(self, progress: Progress) -> None:
        if progress.due(LOOKS):
            self._looks.append(_middle(progress.preview()))

    def path(self, output: Path) -> Path:
        """Where the growth of the output at `output` goes. No other output of that name goes there."""
        return output.with_name(f"{output.stem}.growth{KINDS[self.kind]}")

    def check(self, outputs: list[Path]) -> None:
        """Raises UsageError unless the growth of all `outputs` can be written. Creates nothing."""
        check_writable([self.path(output) for output in outputs])

    def write(self, output: Output) -> Path:
        """Writes how `output`, the last one made, grew, and returns the file's path."""
        assert output.path is not None, "growth is shown beside a file"
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
    """`pixels` `[h, w, 3]` resized. Enlarged pixels stay squares, so that the grid is seen to grow."""
    way = Image.Resampling.NEAREST if height > len(pixels) else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(pixels).resize((width, height), way))
