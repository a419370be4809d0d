"""Measures what progressive resolution costs in quality, on the embedded demo.

    python bench/quality.py

It makes the same 200 pictures (captions and seeds) in every cell of `bench/cells.py` and measures them by
`bench/metrics.py`. `quality.json`, `quality.md`, `quality.png` and `sheet.jpg` go to
`bench/results/quality/`. Pictures stay in `--work`, so that an interrupted run continues where it was.
"""

import argparse
import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import jax
import metrics
import numpy as np
from cells import BASELINE, CELLS, QUESTIONS, Cell
from metrics import BIASED, Estimate, Features, estimate
from report import contact_sheet, plot, table
from sampling import Demo, captions, drawn, sample
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results" / "quality"
RESAMPLES = 1000
# The cells are compared to training pictures. As many fresh drawings as a cell has pictures show what a
# perfect model would reach.
REFERENCE_SEED, REFERENCE_COUNT, FRESH_SEED = 0, 800, 6_000_000
FRESH = "drawn pictures"


class Judge:
    """Measures sets of pictures made for the same prompts."""

    def __init__(self, reference: np.ndarray, count: int):
        self.scenes = captions(count)[0]
        self.counts = metrics.resamples(count, RESAMPLES)
        self.describe = Features.fit(reference)
        self.reference = self.describe(reference)
        self.power = metrics.band_powers(reference).mean(0)

    def draws(self, pictures: np.ndarray, originals: np.ndarray | None) -> dict[str, np.ndarray]:
        """Each measure of the set and of its resamples, `[R]`. PSNR and SSIM need `originals`."""
        power = metrics.means(metrics.band_powers(pictures), self.counts)
        found = {
            "frechet": metrics.frechet_of(self.describe(pictures), self.counts, self.reference),
            "spectrum": metrics.spectrum_distance(power, self.power),
        }
        if originals is not None:
            for name in ("psnr", "ssim"):
                found[name] = metrics.means(getattr(metrics, name)(pictures, originals), self.counts)
        return found

    def attributes(self, pictures: np.ndarray) -> np.ndarray:
        """The share of pictures that show what was asked for, in the set and in its resamples, `[R]`."""
        return metrics.means(metrics.attributes_found(pictures, self.scenes).astype(float), self.counts)


def estimates(draws: dict[str, np.ndarray]) -> dict[str, Estimate]:
    """Every measure's figure and interval."""
    return {name: estimate(values, name in BIASED) for name, values in draws.items()}


def differences(draws: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> dict[str, dict]:
    """By how much each measure exceeds that of `base`, over the same pictures, if both have it."""
    found = estimates({name: draws[name] - base[name] for name in draws if name in base})
    return {name: {**asdict(one), "certain": one.certain} for name, one in found.items()}


def measure(judge: Judge, cells: list[Cell], made: dict) -> dict[str, dict[str, np.ndarray]]:
    """Each measure of every cell and of its resamples, `[R]`."""
    draws = {}
    for cell in tqdm(cells, desc="measured"):
        pictures = np.asarray(made[cell.name][1])
        originals = None if cell.name == cell.baseline else np.asarray(made[cell.baseline][1])
        draws[cell.name] = judge.draws(pictures, originals) | {"attributes": judge.attributes(pictures)}
    return draws


def figures_of(cells: list[Cell], draws: dict[str, dict[str, np.ndarray]]) -> dict[str, dict]:
    """Every cell's figures with their intervals, and their differences to its baseline's."""
    figures = {}
    for cell in cells:
        ours = draws[cell.name]
        figures[cell.name] = {name: asdict(one) for name, one in estimates(ours).items()}
        if cell.name != cell.baseline:
            for name, found in differences(ours, draws[cell.baseline]).items():
                figures[cell.name][name]["difference"] = found
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="pictures a cell")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="where pictures are kept")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results go")
    args = parser.parse_args()

    demo = Demo(args.count)
    made = sample(demo, CELLS, args.work)
    judge = Judge(drawn(REFERENCE_COUNT, REFERENCE_SEED, args.work), args.count)
    fresh = drawn(args.count, FRESH_SEED, args.work)
    draws = measure(judge, CELLS, made)
    figures = figures_of(CELLS, draws)
    for cell in CELLS:
        plan = made[cell.name][0]
        full = made[cell.baseline][0]
        figures[cell.name]["flops"] = plan.flops(demo.family.forward_flops)
        figures[cell.name]["faster"] = full.flops(demo.family.forward_flops) / figures[cell.name]["flops"]
        figures[cell.name]["steps"] = [stage.steps for stage in plan.stages]
    report = {
        "hardware": f"{platform.machine()}, {jax.device_count()} {jax.devices()[0].device_kind} device",
        "versions": {name: version(name) for name in ("jax", "flax", "torch", "diffusers", "scikit-image")},
        "count": args.count,
        "resamples": RESAMPLES,
        "baseline": BASELINE,
        "cells": figures,
        "questions": [
            {"first": first, "second": second, **differences(draws[first], draws[second])}
            for first, second in QUESTIONS
            if first in draws and second in draws
        ],
        FRESH: {name: asdict(one) for name, one in estimates(judge.draws(fresh, None)).items()},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quality.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "quality.md").write_text(table(report))
    plot(report).savefig(args.out / "quality.png", dpi=110)
    contact_sheet({name: pictures for name, (_, pictures) in made.items()}).save(
        args.out / "sheet.jpg", quality=88
    )
    print(table(report))


if __name__ == "__main__":
    main()
