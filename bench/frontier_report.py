"""The frontier's table, plot and contact sheet."""

from pathlib import Path

import numpy as np
from machine import slug
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

SIDE, SHOWN, MARGIN = 128, 8, 190
KINDS = {
    "Euler": ("euler", False, False),
    "UniPC": ("unipc", False, False),
    "Euler, grown": ("euler", True, False),
    "UniPC, grown": ("unipc", True, False),
    "Euler, forecast": ("euler", False, True),
    "UniPC, forecast": ("unipc", False, True),
    "Euler, both": ("euler", True, True),
    "UniPC, both": ("unipc", True, True),
}


def kind(point: dict) -> str:
    """The name in `KINDS` of a point's kind."""
    settings = point["settings"]
    what = (settings["scheduler"], "progressive_mode" in settings, settings.get("forecast") is not None)
    return next(name for name, told in KINDS.items() if told == what)


def label(point: dict) -> str:
    """A point's title, and the names of the speeds with its settings."""
    return ", ".join([point["title"], *(f"speed {name}" for name in point.get("speeds", []))])


def table(header: dict, points: list[dict], front: list[dict]) -> str:
    """Markdown with all points, the most FLOPs first, and those of the front in bold."""
    titles = {point["title"] for point in front}
    head = ["settings", "steps", "forwards", "FLOPs, times fewer", "seconds", "latents, dB", "by band, dB"]
    head += ["PSNR, dB", "SSIM"]
    lines = [
        f"{header['model']}, {header['prompts']} prompts, against {header['truth']} steps of UniPC at full "
        f"resolution; {header['hardware']}. PSNR of latents and pictures, means of decibels, of latents with "
        "standard error. By band: error as a share of power, from the lowest frequencies to the "
        "highest. In bold what no other beats in both FLOPs and latents.",
        "",
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
    ]
    for point in sorted(points, key=lambda point: (point["faster"], -point["latents"])):
        name = f"**{label(point)}**" if point["title"] in titles else label(point)
        bands = " ".join(f"{band:.0f}" for band in point["bands"])
        row = [name, "+".join(map(str, point["stages"])), str(point["forwards"]), f"{point['faster']:.2f}"]
        row += [f"{point['seconds']:.2f}", f"{point['latents']:.1f} ± {point['uncertainty']:.1f}", bands]
        row += [f"{point['psnr']:.1f}", f"{point['ssim']:.4f}"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def plot(points: list[dict], front: list[dict]) -> Figure:
    """A plot of the distances of latents and of pictures against FLOPs."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, (measure, label) in zip(
        panels, {"latents": "latents", "psnr": "pictures"}.items(), strict=True
    ):
        for number, name in enumerate(KINDS):
            ours = [point for point in points if kind(point) == name]
            if ours:
                at, values = [p["faster"] for p in ours], [p[measure] for p in ours]
                panel.plot(at, values, "oo^^ssDD"[number], color=f"C{number}", ms=5, label=name)
        if measure == "latents":
            at, values = [p["faster"] for p in front], [p[measure] for p in front]
            panel.plot(at, values, "-", color="0.4", lw=1, label="front")
            for point in points:
                for name in point.get("speeds", []):
                    place = {"xytext": (6, 6), "textcoords": "offset points"}
                    panel.annotate(name, (point["faster"], point["latents"]), **place)
        panel.set_xscale("log")
        ticks = [1, 1.5, 2, 3, 4, 6, 8, 12]
        panel.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
        panel.minorticks_off()
        panel.set_xlabel("FLOPs, times fewer than the default's")
        panel.set_ylabel(f"{label}: PSNR to full resolution at many steps, dB")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def save_strip(path: Path, frames: np.ndarray) -> None:
    """Saves the first of `frames` `[N, H, W, 3]`, side by side."""
    Image.fromarray(np.concatenate(frames[:SHOWN], 1)).save(path)


def contact_sheet(front: list[dict], work: Path) -> Image.Image:
    """The strips of the truth and of each point of the front, one below the other."""
    names = {"the truth": work / "truth.png"}
    names |= {f"{p['faster']:.1f}x: {label(p)}": work / f"{slug(p['title'])}.png" for p in front}
    strips = {name: Image.open(path) for name, path in names.items() if path.exists()}
    scale = SIDE / max((strip.height for strip in strips.values()), default=SIDE)
    width = max((round(scale * strip.width) for strip in strips.values()), default=0)
    sheet = Image.new("RGB", (MARGIN + width, len(strips) * SIDE), "white")
    write = ImageDraw.Draw(sheet)
    for row, (name, strip) in enumerate(strips.items()):
        said = name.replace(", ", "\n").replace("δ", "delta")  # the font lacks δ
        write.multiline_text((6, row * SIDE + 40), said, fill="black")
        small = strip.resize((round(scale * strip.width), SIDE), Image.Resampling.LANCZOS)
        sheet.paste(small, (MARGIN, row * SIDE))
    return sheet
