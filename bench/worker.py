"""What the processes of a comparison read and write alike."""

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
        """One array a stage."""
        return [
            self.arrays[f"noise/{n}"] for n in range(sum(key.startswith("noise/") for key in self.arrays))
        ]

    def text(self, kind: str) -> dict[str, np.ndarray]:
        """What a family's `encode` gave for the `positive` or the `negative` prompt; empty without."""
        prefix = f"{kind}/"
        return {key.removeprefix(prefix): a for key, a in self.arrays.items() if key.startswith(prefix)}


class Job:
    """What a process is asked, and in `answer` what it found."""

    def __init__(self, job_file: str, answer_file: str):
        job = json.loads(Path(job_file).read_text())
        self.answer_file = Path(answer_file)
        self.folder, self.dtype, self.matmul = Path(job["checkpoint"]), job["dtype"], job["matmul"]
        self.cells, self.repeats, self.framework = job["cells"], job["repeats"], job["framework"]
        self.encoders, self.prompt = job["encoders"], job["prompt"]
        self.measured = {name: {"denoise": []} for name in self.cells}
        self.answer = {"cells": self.measured}

    def rounds(self) -> Iterator[tuple[str, dict]]:
        """Every cell once, then every cell again the other way round, so that what drifts drifts for all."""
        cells = list(self.measured.items())
        for _ in range(self.repeats):
            yield from cells
            cells.reverse()

    def keep(self, name: str, latents: np.ndarray) -> None:
        """Writes final latents, for comparison with the other frameworks'."""
        np.save(self.cells[name]["latents"], latents)

    def finish(self) -> None:
        self.answer_file.write_text(json.dumps(self.answer))
