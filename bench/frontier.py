"""Finds the settings that give the most for their FLOPs, on any model.

    python bench/frontier.py                                       # the demo
    python bench/frontier.py --model-path M --prompts prompts.txt  # any other

It makes the same outputs, by prompt and seed, with many settings of solver, steps, growth of the grid and
forecast. Each is measured against full resolution at many steps. All see one noise, so they are the same
pictures, and no reference set is needed. `points.jsonl`, `frontier.md`, `frontier.png` and `sheet.jpg` go to
`bench/results/frontier/`. A second run finds earlier measurements in `points.jsonl`.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import frontier_report as report
import metrics
import numpy as np
from machine import RESULTS, hardware, slug
from sampling import captions
from scipy.fft import dctn
from tqdm import tqdm

from jaxspd import DiffGenerator
from jaxspd.errors import UsageError
from jaxspd.request import SamplingParams
from jaxspd.request_files import read_prompts
from jaxspd.resolving import resolve
from jaxspd.speed import SETS, SPEEDS, TABLE

Settings = dict[str, Any]  # parameters of a request
SEED = 5_000_000
STEPS = (50, 28, 20, 14, 10, 8, 6, 5, 4)
DELTAS = (0.01, 0.003, 0.001, 0.05, 0.2)
# The edges of the bands in which latents are compared, as shares of the highest frequency along an axis.
BANDS = (0, 1 / 8, 1 / 4, 1 / 2, 2)


def full(scheduler: str, steps: int, forecast: float | None = None) -> Settings:
    """The settings of full resolution."""
    return {"scheduler": scheduler, "num_inference_steps": steps, "forecast": forecast}


def grown(scheduler: str, steps: int, delta: float, forecast: float | None = None, **others) -> Settings:
    """The settings of a grid that grows."""
    growth = {"mode": "dct_rewind", "delta": delta, **others}
    return full(scheduler, steps, forecast) | {f"progressive_{k}": v for k, v in growth.items()}


def candidates() -> list[Settings]:
    """All settings worth trying.

    Full resolution in fewer steps comes first, as the rival of all others. Then come the settings that were
    best on the demo, then the rest, shuffled.
    """
    rivals = [full(scheduler, steps) for scheduler in ("unipc", "euler") for steps in STEPS]
    best = [grown("unipc", steps, delta, history="carry") for delta in DELTAS for steps in STEPS]
    others = []
    for scheduler in ("unipc", "euler"):
        for steps, forecast in product(STEPS, (None, 0.75, 3.0)):
            if forecast is not None and steps < 14:  # nearly every step would evaluate the model
                continue
            others.append(full(scheduler, steps, forecast))
            for delta, levels, respace in product(DELTAS, (1, 2), (False, True)):
                how = {"levels": levels, "respace": respace}
                histories = ("carry", "forget") if scheduler == "unipc" else ("forget",)
                others += [grown(scheduler, steps, delta, forecast, history=h, **how) for h in histories]
    random.Random(0).shuffle(others)
    return list({title(settings): settings for settings in rivals + best + others}.values())


def title(settings: Settings) -> str:
    """`settings` for people, such as `unipc 14, δ 0.05, re-spaced, carried`."""
    words = [f"{settings['scheduler']} {settings['num_inference_steps']}"]
    if settings.get("progressive_mode", "fullres") != "fullres":
        levels = settings.get("progressive_levels") or 1
        words.append(f"δ {settings['progressive_delta']:g}" + f", {levels} levels" * (levels > 1))
        words += ["re-spaced"] * settings.get("progressive_respace", False)
        words += ["carried"] * (settings.get("progressive_history") == "carry")
    if settings.get("forecast") is not None:
        words.append(f"forecast {settings['forecast']:g}")
    return ", ".join(words)


class Trial:
    """Makes one model's outputs for `prompts`, by any settings. All share the parameters `common`."""

    def __init__(self, generator: DiffGenerator, prompts: list[str], common: Settings):
        self.generator, self.family = generator, generator.family
        self.common, self.prompts = common, prompts
        self.truth: tuple[np.ndarray, np.ndarray] | None = None

    def at_speed(self, name: str) -> Settings:
        """The settings that the speed `name` gives a request for this model."""
        request = resolve(self.family, SamplingParams.of({**self.common, "speed": name}))
        settings = full(request.scheduler, request.num_inference_steps)
        if request.progressive_mode != "fullres":
            settings |= {key: getattr(request, key) for key in SETS if key.startswith("progressive")}
        return settings

    def runs(self, settings: Settings) -> tuple | None:
        """A key of the run that `settings` make, which several may share, or None for impossible ones."""
        try:
            plan = self.generator.plan({**self.common, **settings})
        except UsageError:  # such as a stage without a step
            return None
        return settings["scheduler"], replace(plan, delta=None)

    def make(self, settings: Settings) -> tuple[np.ndarray, np.ndarray, list[float], dict]:
        """The clean latents `[N, C, …]`, first frames `[N, H, W, 3]`, seconds of denoising, and the plan."""
        latents, frames, seconds = [], [], []

        def watch(progress) -> None:
            if progress.step.number == progress.plan.steps - 1:
                latents.append(progress.step.after[0])

        for number, prompt in enumerate(self.prompts):
            request = {**self.common, **settings, "prompt": prompt, "seed": SEED + number}
            outputs = self.generator.iterate(request, save_output=False, show_progress=False, watch=watch)
            for output in outputs:
                frames.append(output.frames[0])
                seconds.append(sum(output.seconds["denoise"]))
        return np.stack(latents), np.stack(frames), seconds, outputs.result.plan

    def point(self, settings: Settings, strip: Path) -> dict[str, Any]:
        """The cost of `settings`, and how far their outputs are from the truth.

        The outputs are saved to `strip`, side by side.
        """
        latents, frames, seconds, plan = self.make(settings)
        truth, originals = self.truth
        error = ((latents - truth) ** 2).mean(tuple(range(1, latents.ndim)))
        decibels = 10 * np.log10(np.ptp(truth) ** 2 / error)
        report.save_strip(strip, frames)
        return {
            "title": title(settings),
            "settings": settings,
            "stages": [stage["end"] - stage["start"] for stage in plan["stages"]],
            "forwards": plan["forwards"],
            "faster": plan["flop_speedup"] * self.family.default_steps / plan["steps"],
            "seconds": float(np.median(seconds)),
            "latents": float(decibels.mean()),
            "uncertainty": float(decibels.std() / np.sqrt(max(len(decibels) - 1, 1))),
            "bands": band_errors(latents, truth),
            "psnr": float(metrics.psnr(frames, originals).mean()),
            "ssim": float(metrics.ssim(frames, originals).mean()),
        }


def band_errors(latents: np.ndarray, truth: np.ndarray) -> list[float]:
    """The power of the error of `latents` `[…, h, w]` divided by that of `truth`, in dB, in each of `BANDS`.

    Frequencies are those of the DCT.
    """
    height, width = truth.shape[-2:]
    omega = np.hypot(np.arange(height)[:, None] / height, np.arange(width) / width)
    power = [dctn(x, axes=(-2, -1), norm="ortho") ** 2 for x in (latents - truth, truth)]
    inside = [(low <= omega) & (omega < high) for low, high in pairwise(BANDS)]
    return [float(10 * np.log10(power[0][..., i].sum() / power[1][..., i].sum())) for i in inside]


def measure(trial: Trial, wanted: list[Settings], header: dict, out: Path, work: Path) -> Iterator[dict]:
    """Yields the points in `out/points.jsonl`, then adds and yields one for each other `wanted` setting.

    Raises SystemExit if the points there were not measured as `header` says.
    """
    file, known = out / "points.jsonl", []
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    if file.exists():
        first, *known = map(json.loads, file.read_text().splitlines())
        if first != header:
            raise SystemExit(f"{file} holds other measurements ({first}); choose another folder with --out")
    else:
        file.write_text(json.dumps(header, ensure_ascii=False) + "\n")
    yield from known
    seen = {trial.runs(point["settings"]) for point in known} | {None}
    for settings in tqdm(wanted, desc="settings"):
        runs = trial.runs(settings)
        if runs in seen:
            continue
        seen.add(runs)
        if trial.truth is None:
            trial.truth = trial.make(full("unipc", header["truth"]))[:2]
            report.save_strip(work / "truth.png", trial.truth[1])
        point = trial.point(settings, work / f"{slug(title(settings))}.png")
        with file.open("a") as lines:
            lines.write(json.dumps(point, ensure_ascii=False) + "\n")
        yield point


def front(points: list[dict]) -> list[dict]:
    """The points that no other beats in both FLOPs and distance of latents. The most FLOPs come first."""
    best, found = -np.inf, []
    for point in sorted(points, key=lambda point: (-point["faster"], -point["latents"])):
        if point["latents"] > best:
            best = point["latents"]
            found.append(point)
    return found[::-1]


def note(points: list[dict]) -> None:
    """Writes the figures of the speeds, measured on the demo, into the package's table of speeds."""
    table = json.loads(TABLE.read_text())
    for point in points:
        for name in point.get("speeds", []):
            figures = {"faster": 2, "latents": 1, "psnr": 1, "ssim": 3}
            table[name]["demo"] = {figure: round(point[figure], digits) for figure, digits in figures.items()}
    TABLE.write_text(json.dumps(table, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", help="folder or hub id (default: the demo)")
    parser.add_argument("--prompts", type=Path, help="text file with a prompt a line (default: the demo's)")
    parser.add_argument("--count", type=int, default=8, help="prompts (default: %(default)s)")
    parser.add_argument("--settings", type=int, default=80, help="how many to measure (default: %(default)s)")
    parser.add_argument("--truth", type=int, default=100, help="steps of the truth (default: %(default)s)")
    parser.add_argument("--common", type=json.loads, default={}, help='as {"height": 512}: for all outputs')
    parser.add_argument("--out", type=Path, default=RESULTS / "frontier", help="where results go")
    parser.add_argument("--work", type=Path, default=Path("build/frontier"), help="where pictures are kept")
    args = parser.parse_args()

    if args.model_path and not args.prompts:
        parser.error("--prompts is needed: what to show with this model")
    prompts = (read_prompts(args.prompts) if args.prompts else captions(args.count)[1])[: args.count]
    generator = DiffGenerator.from_pretrained(args.model_path)
    header = {
        "model": args.model_path or "the demo",
        "prompts": len(prompts),
        "of": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16],
        "common": args.common,
        "truth": args.truth,
        "hardware": hardware(),
    }
    trial = Trial(generator, prompts, args.common)
    speeds = {name: trial.at_speed(name) for name in SPEEDS}
    wanted = [*speeds.values(), *candidates()[: args.settings]]
    points = list(measure(trial, wanted, header, args.out, args.work))
    best, by_run = front(points), {trial.runs(point["settings"]): point for point in points}
    for name, settings in speeds.items():
        by_run[trial.runs(settings)].setdefault("speeds", []).append(name)
    if not args.model_path and args.out == RESULTS / "frontier":
        note(points)
    (args.out / "frontier.md").write_text(report.table(header, points, best))
    report.plot(points, best).savefig(args.out / "frontier.png", dpi=110)
    report.contact_sheet(best, args.work).save(args.out / "sheet.jpg", quality=88)
    print(report.table(header, points, best))


if __name__ == "__main__":
    main()
