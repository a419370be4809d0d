"""The inputs and the job of a comparison's processes."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np


class Inputs:
    """Noise and text of a cell, as `prepare.py` wrote them."""

    def __init__(self, path: str):
        with np.load(path) as arrays:
            self.arrays = dict(arrays)

    def noises(self) -> list[np.ndarray]:
        """The noise of each stage."""
        return [
            self.arrays[f"noise/{n}"] for n in range(sum(key.startswith("noise/") for key in self.arrays))
        ]

    def text(self, kind: str) -> dict[str, np.ndarray]:
        """The encoded `positive` or `negative` prompt, as a family's `encode` gives it, or an empty dict."""
        prefix = f"{kind}/"
        return {key.removeprefix(prefix): a for key, a in self.arrays.items() if key.startswith(prefix)}


class Job:
    """A process's job, and in `answer` what it found."""

    def __init__(self, job_file: str, answer_file: str):
        job = json.loads(Path(job_file).read_text())
        self.answer_file = Path(answer_file)
        self.folder, self.dtype, self.matmul = Path(job["checkpoint"]), job["dtype"], job["matmul"]
        self.cells, self.repeats, self.framework = job["cells"], job["repeats"], job["framework"]
        self.encoders, self.prompt = job["encoders"], job["prompt"]
        self.measured = {name: {"denoise": []} for name in self.cells}
        self.answer = {"cells": self.measured}

    def rounds(self) -> Iterator[tuple[str, dict]]:
        """Yields every cell once, then again in reverse order, and so on, so that drift affects all alike."""
        cells = list(self.measured.items())
        for _ in range(self.repeats):
            yield from cells
            cells.reverse()

    def keep(self, name: str, latents: np.ndarray) -> None:
        """Writes final latents, for comparison with the other frameworks'."""
        np.save(self.cells[name]["latents"], latents)

    def finish(self) -> None:
        self.answer_file.write_text(json.dumps(self.answer))
