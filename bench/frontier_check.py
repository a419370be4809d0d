"""Does the distance by which `bench/frontier.py` ranks settings rank them as a reference set does?

    python bench/frontier_check.py

makes pictures of the study's prompts with the demo at each speed, and with some rivals, and measures them by
the study's Fréchet distance, spectrum and check of the prompt (`bench/quality.py`), beside the frontier's
distance. Writes `check.json` and `check.md` to `bench/results/frontier/`. An interrupted run goes on where it
was.
"""

import argparse
import json
from pathlib import Path

import quality
from cells import Cell
from frontier import full, grown, title
from machine import RESULTS, hardware
from report import entry
from sampling import Demo, drawn, sample
from scipy.stats import spearmanr

from jaxspd.speed import SPEEDS

MEASURES = {"attributes": "{:.1%}", "frechet": "{:.2f}", "spectrum": "{:.2f}"}
RIVALS = [
    full("unipc", 10),
    full("unipc", 8),
    full("unipc", 4),
    full("euler", 14),
    full("euler", 8),
    grown("unipc", 14, 0.05, history="carry"),
    grown("unipc", 8, 0.2, history="carry"),
]


def cells() -> list[Cell]:
    """The published setting, which all are compared to; the other speeds; their rivals."""
    exact, speeds = full("euler", 50), [speed.sets for speed in SPEEDS.values() if speed.sets]
    made = []
    for settings in (exact, *speeds, *RIVALS):
        rest = {name: value for name, value in settings.items() if name != "num_inference_steps"}
        made.append(Cell(title(settings), rest, settings["num_inference_steps"], baseline=title(exact)))
    return made


def table(figures: dict[str, dict], agreement: dict[str, float]) -> str:
    """Markdown: every setting's figures and, in brackets, how far they lie from the published setting's."""
    lines = ["| settings | FLOPs, times fewer | latents, dB | prompt found | Fréchet | spectrum, dB |"]
    lines.append("|" + "---|" * 6)
    for name, cell in sorted(figures.items(), key=lambda item: -item[1]["latents"]):
        row = [name, f"{cell['faster']:.2f}", f"{cell['latents']:.1f}"]
        row += [entry(cell[measure], form) for measure, form in MEASURES.items()]
        lines.append(f"| {' | '.join(row)} |")
    ranks = " and ".join(f"{value:.2f} to {name}" for name, value in agreement.items())
    return "\n".join(lines) + f"\n\nRank correlation of the latents' distance: {ranks}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="pictures for each setting")
    parser.add_argument("--reference", type=int, default=400, help="drawn pictures to compare them to")
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
    report |= {"cells": figures, "agreement": agreement}
    (args.out / "check.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    (args.out / "check.md").write_text(table(figures, agreement))
    print(table(figures, agreement))


if __name__ == "__main__":
    main()
