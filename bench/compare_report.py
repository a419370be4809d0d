"""The tables and the plot of what `compare.py` measured."""

import statistics
from collections.abc import Iterable

from compare_numbers import (
    JUDGE,
    cells,
    denoising,
    distance,
    flops,
    limit,
    matmul,
    runs,
    speed_up,
    step_flops,
    steps,
)
from matplotlib.figure import Figure
from presets import FULLRES, PUBLISHED_ON

COLOURS = {
    "jaxspd": "#c0392b",
    JUDGE: "#7f8c8d",
    "PyTorch, compiled": "#2471a3",
    "PyTorch, compiled, progressive": "#2471a3",
}


def row(values: Iterable) -> str:
    return f"| {' | '.join(map(str, values))} |"


def head(*titles: str) -> list[str]:
    return [row(titles), "|" + "---|" * len(titles)]


def speed_table(model: dict) -> list[str]:
    """A row for each cell and framework."""
    lines = head(
        "cell",
        "framework",
        "denoise, s (min–max)",
        "by stage, s",
        "speed-up",
        "of the FLOP limit",
        "against eager",
        "TFLOP",
        "GFLOP/s",
        "of a matrix product",
        "latents",
    )
    peak = max(matmul(model).values())
    for cell, framework in cells(model):
        seconds = denoising(model, framework, cell)
        middle = statistics.median(seconds)
        stages = [statistics.median(stage) for stage in zip(*runs(model, framework, cell), strict=True)]
        work = flops(model, framework, cell)
        faster = speed_up(model, framework, cell)
        grown = cell != FULLRES
        lines.append(
            row(
                [
                    cell,
                    framework,
                    f"{middle:.3g} ({min(seconds):.3g}–{max(seconds):.3g})",
                    " + ".join(f"{stage:.3g}" for stage in stages),
                    f"{faster:.2f}×" if grown else "",
                    f"{faster / limit(model, framework, cell):.0%} of {limit(model, framework, cell):.2f}×"
                    if grown
                    else "",
                    f"{statistics.median(denoising(model, JUDGE, cell)) / middle:.2f}×",
                    f"{work / 1e12:.3g}",
                    f"{work / middle / 1e9:.3g}",
                    f"{work / middle / peak:.0%}",
                    f"{distance(model, framework, cell):.0e}",
                ]
            )
        )
    return lines


def step_table(model: dict) -> list[str]:
    """A row for each latent grid."""
    by_grid = steps(model)
    frameworks = list(next(iter(by_grid.values())))
    lines = head("seconds a step on", *frameworks, "jaxspd / PyTorch's best")
    for grid, seconds in by_grid.items():
        best = min(value for framework, value in seconds.items() if framework != "jaxspd")
        rates = {name: step_flops(model, name)[grid] / seconds[name] for name in frameworks}
        lines.append(
            row(
                [
                    "×".join(map(str, grid)),
                    *(f"{seconds[name]:.4f} ({rates[name] / 1e9:.3g} GFLOP/s)" for name in frameworks),
                    f"{seconds['jaxspd'] / best:.2f}",
                ]
            )
        )
    return lines


def rest_table(model: dict) -> list[str]:
    """Everything but denoising, with a row for each framework."""
    lines = head(
        "framework",
        "load, s",
        "compile, s: anew",
        "from the cache",
        "recompiles",
        "compiled while denoising",
        "text, s",
        "decode, s",
        "peak host, GB",
        "peak device, GB",
    )
    for framework, answers in sorted(model["processes"].items(), key=lambda item: item[0] != "jaxspd"):

        def middle(key: str, answers=answers, form="{:.3g}") -> str:
            found = [answer[key] for answer in answers if key in answer]
            return form.format(statistics.median(found)) if found else ""

        def compiling(answers: list[dict]) -> str:
            sums = [sum(c.get("compile", 0) for c in answer["cells"].values()) for answer in answers]
            return f"{statistics.median(sums):.3g}" if answers and any(sums) else ""

        def peak(where: str, answers=answers) -> str:
            found = [answer["peak"][where] for answer in answers if where in answer["peak"]]
            return f"{max(found) / 1e9:.2f}" if found else ""

        recompiles = [sum(c.get("recompiles", 0) for c in a["cells"].values()) for a in answers]
        lines.append(
            row(
                [
                    framework,
                    middle("load"),
                    compiling(answers[:1]),
                    compiling(answers[1:]),
                    max(recompiles) if "compiled" in framework else "",
                    max(answer["compiled_later"] for answer in answers),
                    middle("text"),
                    middle("decode"),
                    peak("host"),
                    peak("device"),
                ]
            )
        )
    return lines


def published_table(model: dict) -> list[str]:
    """Seconds that others published for their hardware, for orientation."""
    seconds = {cell: value for cell, value in model["published"].items() if value}
    if not seconds:
        return []
    lines = [
        "",
        f"Published, not measured here ({PUBLISHED_ON}):",
        "",
        *head("cell", "denoise, s", "speed-up"),
    ]
    speedups = model.get("published_speedup", {})
    for cell, value in seconds.items():
        speedup = speedups.get(cell) or seconds[FULLRES] / value
        lines.append(row([cell, f"{value:g}", "" if cell == FULLRES else f"{speedup:.2f}×"]))
    if note := model.get("published_note"):
        lines += ["", note]
    return lines


def markdown(report: dict) -> str:
    """All tables."""
    preset, versions = report["preset"], report["versions"]
    lines = [
        f"# The `{preset['name']}` preset on {report['hardware']}",
        "",
        f"{preset['dtype']}; " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ".",
        "Medians of all timed runs, warm-up apart; each framework in processes of its own, in turns. A",
        "speed-up is against full resolution in the same framework, the median of the rounds' ratios; its",
        "limit is how many times fewer FLOPs the plan takes. TFLOP are those of all forwards: matrix",
        "products and attention. GFLOP/s are compared with a matrix product in the framework that is faster",
        "at it. `latents` is the largest distance of the final latents from those of eager PyTorch, relative",
        "to their norm. jaxspd loads the transformer, and reads encoders and VAE each time it uses",
        "them; PyTorch loads them all at first.",
    ]
    for name, model in report["models"].items():
        request = ", ".join(f"{key} {value}" for key, value in model["request"].items())
        text = f"{model['text_tokens']['jax']} tokens of text"
        if model["text_tokens"]["torch"] != model["text_tokens"]["jax"]:
            text += f" ({model['text_tokens']['torch']} without padding, as PyTorch runs them)"
        peaks = [f"{rate / 1e9:,.0f} GFLOP/s in {framework}" for framework, rate in matmul(model).items()]
        kept = "" if model["encoders"] else "; weights and text drawn at random, no text encoders"
        lines += [
            "",
            f"## {name}",
            "",
            f"{model['parameters'] / 1e6:,.1f} M parameters, {text}; {request}{kept}. "
            f"A matrix product reaches {' and '.join(peaks)}.",
            "",
            *speed_table(model),
            "",
            *step_table(model),
            "",
            *rest_table(model),
            *published_table(model),
        ]
    return "\n".join(lines) + "\n"


def plot(report: dict) -> Figure:
    """For each model, the speed-up against δ, and the seconds by stage."""
    models = report["models"]
    figure = Figure(figsize=(12, 3.6 * len(models)), layout="constrained")
    for (left, right), (name, model) in zip(
        figure.subplots(len(models), 2, squeeze=False), models.items(), strict=True
    ):
        one_level = {
            cell: values["plan"]["delta"]
            for cell, values in model["cells"].items()
            if values["plan"]["levels"] == 1
        }
        deltas = [f"{delta:g}" for delta in one_level.values()]
        for framework in model["processes"]:
            ran = [cell for cell in one_level if runs(model, framework, cell)]
            if ran:
                values = [speed_up(model, framework, cell) for cell in ran]
                left.plot(deltas, values, "o-", color=COLOURS[framework], label=framework)
        limits = [limit(model, "jaxspd", cell) for cell in one_level]
        left.plot(deltas, limits, "_--", color="black", label="by FLOPs")
        left.set(title=name, xlabel="δ", ylabel="speed-up over full resolution")
        left.legend(fontsize="small")
        bars = list(cells(model))
        for place, (cell, framework) in enumerate(bars):
            start = 0.0
            for stage, seconds in enumerate(zip(*runs(model, framework, cell), strict=True)):
                width = statistics.median(seconds)
                shade = 1 if stage == len(model["cells"][cell]["steps"]) - 1 else 0.5
                right.barh(place, width, left=start, color=COLOURS[framework], alpha=shade)
                start += width
        right.set_yticks(
            range(len(bars)), [f"{cell} · {framework}" for cell, framework in bars], fontsize="x-small"
        )
        right.invert_yaxis()
        right.set(title="by stage, coarse ones pale", xlabel="denoising, s")
    return figure
