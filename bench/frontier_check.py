"""Does the distance by which `bench/frontier.py` ranks settings rank them as a reference set does?

    python bench/frontier_check.py

The demo makes pictures of the study's prompts at each speed and with some rival settings. They are measured
by the study's Fréchet distance, spectrum and check of the prompt (`bench/quality.py`), beside the frontier's
distance. Then the speeds denoise one picture in turns, to compare their seconds with their FLOPs.
`check.json` and `check.md` go to `bench/results/frontier/`. An interrupted run continues where it was.
"""

import argparse
import json
from pathlib import Path

import quality
from cells import Cell
from frontier import full, grown, title
from machine import RESULTS, hardware
from report import entry
from sampling import Demo, captions, drawn, sample
from scipy.stats import spearmanr

from jaxspd import DiffGenerator
from jaxspd.speed import SPEEDS

MEASURES = {"attributes": "{:.1%}", "frechet": "{:.2f}", "spectrum": "{:.2f}"}
RIVALS = [full("unipc", 4), grown("unipc", 8, 0.2, history="carry")]


def cells() -> list[Cell]:
    """The published setting, which all others are compared to, the other speeds, and their rivals."""
    exact, speeds = full("euler", 50), [speed.sets for speed in SPEEDS.values() if speed.sets]
    made = []
    for settings in (exact, *speeds, *RIVALS):
        rest = {name: value for name, value in settings.items() if name != "num_inference_steps"}
        made.append(Cell(title(settings), rest, settings["num_inference_steps"], baseline=title(exact)))
    return made


def seconds(rounds: int) -> dict[str, dict[str, float]]:
    """For each speed, the fewest `seconds` of denoising one picture in `rounds` turns, and its FLOPs.

    The fewest count because other work on the machine only adds to them. The FLOPs are given as `times`: the
    first speed's divided by this one's.
    """
    generator, taken = DiffGenerator.from_pretrained(), {name: [] for name in SPEEDS}
    request = {"prompt": captions(1)[1][0], "seed": 0}
    for turn in range(rounds + 1):
        for name, found in taken.items():
            made = generator.generate({**request, "speed": name}, save_output=False, show_progress=False)
            if turn:  # the first turn reads weights and compiles
                found.append(sum(made.seconds["denoise"]))
    flops = [
        generator.plan({**request, "speed": name}).flops(generator.family.forward_flops) for name in SPEEDS
    ]
    return {
        name: {"seconds": min(found), "times": flops[0] / own}
        for (name, found), own in zip(taken.items(), flops, strict=True)
    }


def table(figures: dict[str, dict], agreement: dict[str, float], timed: dict[str, dict]) -> str:
    """Markdown with every setting's figures, then the speeds' seconds.

    Differences to the published setting's figures are in brackets.
    """
    lines = ["| settings | FLOPs, times fewer | latents, dB | prompt found | Fréchet | spectrum, dB |"]
    lines.append("|" + "---|" * 6)
    for name, cell in sorted(figures.items(), key=lambda item: -item[1]["latents"]):
        row = [name, f"{cell['faster']:.2f}", f"{cell['latents']:.1f}"]
        row += [entry(cell[measure], form) for measure, form in MEASURES.items()]
        lines.append(f"| {' | '.join(row)} |")
    ranks = " and ".join(f"{value:.2f} to {name}" for name, value in agreement.items())
    lines += ["", f"Rank correlation of the latents' distance: {ranks}.", ""]
    lines += ["| speed | seconds of denoising | times faster | of what FLOPs promise |", "|---|---|---|---|"]
    for name, own in timed.items():
        faster = timed["exact"]["seconds"] / own["seconds"]
        lines.append(f"| {name} | {own['seconds']:.3f} | {faster:.2f} | {faster / own['times']:.0%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="pictures for each setting")
    parser.add_argument("--reference", type=int, default=200, help="drawn pictures to compare them to")
    parser.add_argument("--rounds", type=int, default=9, help="turns in which the speeds are timed")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="where pictures are kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "frontier", help="where results are, and go")
    args = parser.parse_args()

    lines = (args.out / "points.jsonl").read_text().splitlines()[1:]
    latents = {point["title"]: point["latents"] for point in map(json.loads, lines)}
    demo, wanted = Demo(args.count), [cell for cell in cells() if cell.name in latents]
    made = sample(demo, wanted, args.work)
    reference = drawn(args.reference, quality.REFERENCE_SEED, args.work)
    draws = quality.measure(quality.Judge(reference, args.count), wanted, made)
    figures = quality.figures_of(wanted, draws)
    dearest = made[wanted[0].name][0].flops(demo.family.forward_flops)
    for name, cell in figures.items():
        cell["faster"] = dearest / made[name][0].flops(demo.family.forward_flops)
        cell["latents"] = latents[name]
    near = [cell["latents"] for cell in figures.values()]
    agreement = {
        measure: float(-spearmanr(near, [cell[measure]["value"] for cell in figures.values()]).statistic)
        for measure in ("frechet", "spectrum")
    }
    report = {"hardware": hardware(), "count": args.count, "reference": args.reference}
    report |= {"cells": figures, "agreement": agreement, "seconds": seconds(args.rounds)}
    told = table(figures, agreement, report["seconds"])
    (args.out / "check.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    (args.out / "check.md").write_text(told)
    print(told)


if __name__ == "__main__":
    main()
