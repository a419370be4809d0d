"""The tables of `bench/devices.py` in Markdown."""

from device_meshes import markdown as of_meshes
from device_meshes import table
from device_models import MODELS, Published

TITLES = {"a6000": "RTX A6000, 48 GB", "h100": "H100, 80 GB"} | {
    "v5e": "TPU v5e, 16 GB",
    "v6e": "TPU v6e, 32 GB",
}
# The clock rates of TPUs' matrix units in GHz, which turn cycles into seconds.
CLOCK = {"v5e": 1.5, "v6e": 1.75}
HEAD = """# What the compilers say

Made by `bench/devices.py`, which says how. No such card was there: sizes are facts, times are guesses of the
compiler. GB are 10⁹ bytes. Of each model in bfloat16 (Wan's VAE in float32, as its card says), one output,
one level, δ 0.05, text as long as the model reads. "In int8" and "in fp8" are with
`--quantize`.

- *weights*: of the transformer. They stay on the card throughout.
- *encode*: the text encoder alone, whose layers come one after the other from their file. With guidance it
  reads two texts.
- *denoise*: a step with the weights, on the coarse and on the full grid; with guidance in one forward or in
  two.
- *decode*: the VAE alone with its weights, without tiles; of a video one chunk after the other.
- *in all*: the most that the card holds: weights and encoding, denoising in the leaner way, or weights and
  decoding. Less memory than that still decodes, in tiles.
- *compile s*: on one core, which other work shared.
"""


def gb(size: float | None) -> str:
    return "–" if size is None else f"{size / 1e9:.2f}"


def rows(card: str, answers: dict) -> list[list[str]]:
    """A row for each model of which a step is known."""
    found = []
    for model in MODELS:
        if not (known := answers.get(model.name)):
            continue
        published = Published(model)
        own = {program.name for program in published.own}
        known |= {name: one for name, one in answers.get(published.whole, {}).items() if name not in own}
        of_kind = {
            kind: [p for p in published.programs if p.kind == kind]
            for kind in ("encode", "denoise", "decode")
        }

        def told(program, name="bytes", known=known):
            return known.get(program.name, {}).get(name)

        encodes = [told(p) for p in of_kind["encode"]]
        encode = max(encodes) if None not in encodes else None
        [decode] = (told(p) for p in of_kind["decode"])
        denoise = of_kind["denoise"]
        weights = next((w for p in denoise if (w := told(p, "weights"))), None)
        if weights is None:
            continue
        ways = sorted({p.forwards for p in denoise})
        steps = ["/".join(gb(told(p)) for p in denoise if p.forwards == way) for way in ways]
        lean = [told(p) for p in denoise if p.forwards == ways[-1]]
        phases = [*lean, *(part and part + weights for part in (encode, decode))]
        full = [p for p in denoise if p.forwards == 1]
        fused = "all"
        for program in denoise:
            if told(program, "layers") != told(program, "fused_layers"):
                fused = f"{told(program, 'fused_layers')} of {told(program, 'layers')}"
        if any(told(p) is None for p in denoise):
            fused = "–"
        flops = "/".join("–" if (f := told(p, "flops")) is None else f"{f / 1e12:.1f}" for p in full)
        seconds = sum(told(p, "compile_seconds") or 0 for p in full)
        row = [model.name, gb(weights), gb(encode), " or ".join(steps), gb(decode)]
        row += [gb(max(phases)) if None not in phases else "–", fused, flops, f"{seconds:.0f}"]
        if card in CLOCK:
            times = [told(p, "cycles") for p in full]
            row.append("/".join("–" if c is None else f"{c / CLOCK[card] / 1e6:.0f}" for c in times))
        found.append(row)
    return found


def markdown(answers: dict) -> str:
    """The tables, one for each card, and what did not compile."""
    lines = [HEAD]
    for card, title in TITLES.items():
        if card not in answers:
            continue
        head = ["model", "weights", "encode", "denoise, coarse/full", "decode", "in all"]
        head += ["layers with fused attention", "TFLOP a step", "compile s, both grids"]
        head += ["ms a step by cycles, kernels left out"] if card in CLOCK else []
        lines += [f"## {title}", "", *table(head, rows(card, answers[card]))]
        lines += failures(answers[card])
    return "\n".join([*lines, *of_meshes(answers)]).rstrip() + "\n"


def failures(answers: dict) -> list[str]:
    """Lines that say what did not compile, and why."""
    errors = [
        f"- {model}, {program}: {found['error']}"
        for model, programs in answers.items()
        for program, found in programs.items()
        if "error" in found
    ]
    return ["Not compiled:", "", *errors, ""] if errors else []
