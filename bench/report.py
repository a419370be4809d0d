"""The quality study's table, plot and contact sheet."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

MEASURES = {
    "attributes": ("prompt found", "{:.1%}"),
    "frechet": ("Fréchet", "{:.2f}"),
    "spectrum": ("spectrum, dB", "{:.2f}"),
    "psnr": ("PSNR, dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
}
ASKED = ("attributes", "frechet", "spectrum")
# The rows of the contact sheet.
SHOWN = (
    "fullres",
    "dct_rewind 0.05",
    "dct_rewind 0.2",
    "dct_rewind 0.5",
    "re-spaced 0.2",
    "dct 0.05",
    "fft rewind 0.2",
    "dwt rewind 0.2",
    "bilinear at 0.05",
    "fewer steps, as 0.2",
    "one noise 0.05",
)
PICTURES, SIDE = 8, 128


def table(report: dict) -> str:
    """Markdown with each cell's figures, then with the differences of pairs of cells, first minus second.

    Differences to the baseline are in brackets, with their 95 % intervals. A difference whose interval
    excludes 0 is in bold.
    """
    head = ["cell", "steps", "FLOPs, times fewer", *(title for title, _ in MEASURES.values())]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, cell in report["cells"].items():
        row = [name, "+".join(map(str, cell["steps"])), f"{cell['faster']:.2f}"]
        for measure, (_, form) in MEASURES.items():
            row.append(entry(cell[measure], form) if measure in cell else "")
        lines.append(f"| {' | '.join(row)} |")
    drawn = report["drawn pictures"]
    row = ["drawn pictures", "", ""]
    row += [entry(drawn[m], form) if m in drawn else "" for m, (_, form) in MEASURES.items()]
    lines.append(f"| {' | '.join(row)} |")
    lines += [
        "",
        "| first | second | " + " | ".join(MEASURES[name][0] for name in ASKED) + " |",
        "|" + "---|" * 5,
    ]
    for question in report["questions"]:
        row = [question["first"], question["second"]]
        row += [apart(question[name], MEASURES[name][1]) for name in ASKED]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def entry(figure: dict, form: str) -> str:
    """A figure with its difference to the baseline's, or with its interval if there is no difference."""
    shown = form.format(figure["value"])
    if "difference" in figure:
        return f"{shown} ({apart(figure['difference'], form)})"
    return f"{shown} [{form.format(figure['low'])}, {form.format(figure['high'])}]"


def apart(difference: dict, form: str) -> str:
    """A difference and its interval."""
    value, low, high = (form.replace(":", ":+").format(difference[k]) for k in ("value", "low", "high"))
    return f"{f'**{value}**' if difference['certain'] else value}; {low} to {high}"


def plot(report: dict) -> Figure:
    """A plot of Fréchet and spectrum distance above full resolution's against FLOPs, with 95 % intervals."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    panels = figure.subplots(1, 2)
    groups = {}
    for name, cell in report["cells"].items():
        if "difference" in cell["frechet"] and "50 steps" not in name:
            groups.setdefault(name.rpartition(" ")[0].removesuffix(" at"), []).append(cell)
    beyond = [group for group in groups if group in ("bilinear",)]
    for panel, (measure, top) in zip(panels, {"frechet": 18, "spectrum": 2.8}.items(), strict=True):
        for number, (group, cells) in enumerate(groups.items()):
            cells = sorted(cells, key=lambda cell: cell["faster"])
            found = [cell[measure]["difference"] for cell in cells]
            values = np.array([f["value"] for f in found])
            error = [values - [f["low"] for f in found], [f["high"] for f in found] - values]
            # Groups are shifted a little, so that intervals do not hide each other.
            at = [1 / cell["faster"] + 0.0015 * (number - len(groups) / 2) for cell in cells]
            marker, colour = "osD^v<>PX*hpd8"[number % 14], matplotlib.colormaps["tab20"](number % 20)
            panel.errorbar(at, values, error, fmt=marker + "-", color=colour, lw=1, capsize=2, label=group)
        panel.axhline(0, color="0.6", lw=1)
        panel.set_ylim(-top / 9, top)
        panel.set_xlabel("FLOPs, as a share of full resolution's")
        panel.set_ylabel(f"{MEASURES[measure][0]} above full resolution's")
        panel.set_title(f"beyond the upper edge: {', '.join(beyond)}" if beyond else "", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def contact_sheet(pictures: dict[str, np.ndarray]) -> Image.Image:
    """A sheet with a row for each of some cells: its name and its first pictures."""
    rows = [name for name in SHOWN if name in pictures]
    sheet = Image.new("RGB", (150 + PICTURES * SIDE, len(rows) * SIDE), "white")
    write = ImageDraw.Draw(sheet)
    for row, name in enumerate(rows):
        write.text((6, row * SIDE + SIDE // 2 - 6), name, fill="black")
        for column, picture in enumerate(pictures[name][:PICTURES]):
            small = Image.fromarray(np.asarray(picture)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(small, (150 + column * SIDE, row * SIDE))
    return sheet
