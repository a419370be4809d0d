"""The plots of `docs/how-it-works.md`, by jaxspd itself: python docs/figures/draw.py

Their ground is transparent and their grey lies midway, so that they can be read on light pages and on dark.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from scipy.fft import dctn

from jaxspd import DiffGenerator
from jaxspd.families import family_class
from jaxspd.families.base import FLUX1_SPECTRUM
from jaxspd.families.wan import SPECTRUM as WAN_SPECTRUM
from jaxspd.hub import DEMO
from jaxspd.media.growth import Growth
from jaxspd.planning import plan_request
from jaxspd.request import SamplingParams
from jaxspd.spectral.spectrum import Spectrum

HERE = Path(__file__).parent
BLUE, ORANGE, GREEN, GREY = "#3f8ae0", "#e8871e", "#2fa36b", "#858585"
DELTAS = {0.01: BLUE, 0.05: ORANGE, 0.2: GREEN}
GROWN = {"progressive_mode": "dct_rewind", "num_inference_steps": 50, "progressive_delta": 0.05}
matplotlib.rcParams |= {
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxspd",  # the same plot is the same file
    "font.family": "sans-serif",
    "font.size": 11,
    "image.interpolation": "none",
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), GREY),
    **dict.fromkeys(("xtick.color", "ytick.color", "axes.titlecolor"), GREY),
}


def new(width: float, height: float, *shape: int, **options):
    """A figure of so many inches, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(*shape, **options)


def save(figure: Figure, name: str) -> None:
    figure.savefig(HERE / f"{name}.svg", transparent=True, metadata={"Date": None})


def spectrum() -> None:
    """Power against frequency: what was measured on the demo, its fit, and the published laws."""
    measured = json.loads((DEMO / "spectrum.json").read_text())
    figure, axes = new(7, 3.6)
    rings = measured["rings"]
    axes.loglog(rings["omega"], rings["power"], "o", color=GREEN, label="the demo, measured")
    laws = {
        "the demo, fitted": (Spectrum.from_mapping(measured, "the demo"), GREEN, 16),
        "FLUX.1": (FLUX1_SPECTRUM, BLUE, 64),
        "Wan 2.1": (WAN_SPECTRUM, ORANGE, 30),
    }
    for name, (law, colour, highest) in laws.items():
        omega = np.geomspace(1, highest, 50)
        label = f"{name}: {law.amplitude:.1f} · ω^-{law.exponent:.2f}"
        axes.loglog(omega, [law.power(each) for each in omega], color=colour, label=label)
    axes.axhline(1, color=GREY, linestyle=":")
    axes.text(64, 1.15, "white noise at σ = 1", ha="right")
    axes.set_xlabel("frequency ω, cycles per image")
    axes.set_ylabel("power of clean latents")
    axes.legend()
    save(figure, "spectrum")


def activation() -> None:
    """The noise level at which a frequency begins to show, for several δ, with the half grid's limit."""
    figure, axes = new(7, 3.6)
    omega = np.geomspace(1, 64, 200)
    for delta, colour in DELTAS.items():
        axes.semilogx(
            omega,
            [FLUX1_SPECTRUM.activation_time(each, delta) for each in omega],
            color=colour,
            base=2,
            label=f"δ = {delta}",
        )
        left = FLUX1_SPECTRUM.activation_time(32, delta)
        axes.plot(32, left, "o", color=colour)
        axes.annotate(f"{left:.3f}", (32, left), (6, 4), textcoords="offset points", color=colour)
    axes.axvline(32, color=GREY, linestyle=":")
    axes.set_ylim(0.2, 1.04)
    axes.text(31, 0.23, "highest frequency of\nthe 64×64 grid", ha="right")
    axes.set_xticks([2**n for n in range(7)], [2**n for n in range(7)])
    axes.set_xlabel("frequency ω, cycles per image")
    axes.set_ylabel("it begins to show at σ")
    axes.legend(loc="lower left")
    save(figure, "activation")


def stages() -> None:
    """Noise level and tokens of every step of FLUX.1's plan."""
    plan = plan_request(family_class("flux1")(), SamplingParams(**GROWN))
    figure, (above, below) = new(7, 4.2, 2, sharex=True, height_ratios=(2, 1))
    for stage, colour in zip(plan.stages, (BLUE, ORANGE), strict=True):
        steps = np.arange(stage.start, stage.end + 1)
        h, w = stage.latent
        name = f"{h}×{w} latents, steps {stage.start}–{stage.end - 1}"
        above.plot(steps, stage.sigmas, ".-", color=colour, label=name)
        below.bar(steps[:-1] + 0.5, stage.tokens, 0.8, color=colour)
    *_, last = plan.stages
    above.annotate(
        f"the grid grows:\nσ {last.sigma:.3f} becomes {last.aligned_sigma:.3f}",
        (last.start, last.aligned_sigma),
        (last.start + 3, 0.9),
        arrowprops={"arrowstyle": "->", "color": GREY},
    )
    above.axhline(FLUX1_SPECTRUM.activation_time(32, 0.05), color=GREY, linestyle=":")
    above.text(0, FLUX1_SPECTRUM.activation_time(32, 0.05) - 0.1, "the half grid's limit, δ = 0.05")
    above.set_ylabel("noise level σ")
    above.legend(loc="lower left")
    below.set_ylabel("tokens")
    below.set_xlabel("step")
    save(figure, "stages")


def growing(generator: DiffGenerator) -> None:
    """The demo: latents before and after the grid grows, their DCT coefficients, and the picture growing."""
    seen, growth = [], Growth("strip")

    def watch(progress):
        seen.append(progress.step)
        growth(progress)

    request = {"prompt": "a serene mountain lake at golden hour with snow", "seed": 3, **GROWN}
    request |= {"progressive_levels": 2, "progressive_delta": 0.2, "output_path": str(HERE)}
    request |= {"output_file_name": "growth"}
    for output in generator.iterate(request, show_progress=False, watch=watch):
        strip = growth.write(output)
        Image.open(strip).convert("RGB").resize((1440, 160)).save(HERE / "growth.jpg", quality=85)
        strip.unlink()
        output.path.unlink()
    first = next(step for step in seen if step.stage == 2)
    coarse = next(step for step in reversed(seen) if step.stage == 1)
    pairs = [np.asarray(latents)[0, 0] for latents in (coarse.after, first.before)]
    figure, axes = new(7, 2.6, 1, 4, width_ratios=(1, 1, 2, 2))
    titles = ("16×16 latents", "their DCT", "32×32: the corner, and noise", "32×32 latents")
    shown = [pairs[0], dctn(pairs[0], norm="ortho"), dctn(pairs[1], norm="ortho"), pairs[1]]
    for ax, values, title in zip(axes, shown, titles, strict=True):
        ax.imshow(np.clip(values, -3, 3), cmap="RdBu")
        ax.set_title(title, fontsize=10)
        ax.set_axis_off()
    save(figure, "growing")


if __name__ == "__main__":
    spectrum()
    activation()
    stages()
    growing(DiffGenerator.from_pretrained())
