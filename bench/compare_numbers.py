"""What the numbers say that `compare.py` measured."""

import statistics
from collections.abc import Iterable

from presets import FULLRES

# The other frameworks' latents are compared with this framework's.
JUDGE = "PyTorch, eager"


def plain(framework: str) -> str:
    """The name under which the framework runs full resolution."""
    return framework.removesuffix(", progressive")


def runs(model: dict, framework: str, cell: str) -> list[list[float]]:
    """The seconds of each stage, for every timed run."""
    answers = model["processes"][framework]
    return [run for answer in answers if cell in answer["cells"] for run in answer["cells"][cell]["denoise"]]


def denoising(model: dict, framework: str, cell: str) -> list[float]:
    """The seconds of every timed run, in the order in which they ran."""
    return [sum(run) for run in runs(model, framework, cell)]


def matmul(model: dict) -> dict[str, float]:
    """By framework, the FLOP/s of a matrix product: the median over all its processes."""
    found: dict[str, list[float]] = {}
    for framework, answers in model["processes"].items():
        for answer in answers:
            found.setdefault(framework.partition(",")[0], []).extend(answer["matmul_flops"])
    return {framework: statistics.median(values) for framework, values in found.items()}


def cells(model: dict) -> Iterable[tuple[str, str]]:
    """Every (cell, framework) that was run, jaxspd first."""
    frameworks = sorted(model["processes"], key=lambda name: name != "jaxspd")
    for cell in model["cells"]:
        for framework in frameworks:
            if runs(model, framework, cell):
                yield cell, framework


def stage_flops(model: dict, framework: str, cell: str) -> list[float]:
    return model["cells"][cell]["flops"]["jax" if framework == "jaxspd" else "torch"]


def flops(model: dict, framework: str, cell: str) -> float:
    return sum(stage_flops(model, framework, cell))


def limit(model: dict, framework: str, cell: str) -> float:
    """Full resolution's FLOPs divided by this cell's."""
    return flops(model, framework, FULLRES) / flops(model, framework, cell)


def speed_up(model: dict, framework: str, cell: str) -> float:
    """Full resolution's seconds divided by this cell's, in the same framework: the median over rounds.

    Both ran in each round, so a machine that slows down for minutes slows both.
    """
    whole = denoising(model, framework, FULLRES) or denoising(model, plain(framework), FULLRES)
    own = denoising(model, framework, cell)
    return statistics.median(full / grown for full, grown in zip(whole, own, strict=True))


def distance(model: dict, framework: str, cell: str) -> float:
    """The largest relative distance of final latents from eager PyTorch's."""
    answers = model["processes"][framework]
    return max(answer["cells"][cell]["distance"] for answer in answers if cell in answer["cells"])


def wrong(report: dict) -> list[str]:
    """A line for each cell whose latents are further from eager PyTorch's than the preset's bound."""
    bound = report["preset"]["bound"]
    return [
        f"{name}, {framework}, {cell}: latents {distance(model, framework, cell):.1e} apart, beyond {bound:g}"
        for name, model in report["models"].items()
        for cell, framework in cells(model)
        if not distance(model, framework, cell) <= bound
    ]


def steps(model: dict) -> dict[tuple[int, ...], dict[str, float]]:
    """The median seconds of a step, by latent grid and framework, over every run of every cell."""
    found: dict[tuple[int, ...], dict[str, list[float]]] = {}
    for cell, framework in cells(model):
        stages = model["cells"][cell]["plan"]["stages"]
        for run in runs(model, framework, cell):
            for stage, count, seconds in zip(stages, model["cells"][cell]["steps"], run, strict=True):
                own = found.setdefault(tuple(stage["latent"]), {})
                own.setdefault(plain(framework), []).append(seconds / count)
    return {
        grid: {framework: statistics.median(times) for framework, times in own.items()}
        for grid, own in sorted(found.items())
    }


def step_flops(model: dict, framework: str) -> dict[tuple[int, ...], float]:
    """The FLOPs of a step, by latent grid."""
    return {
        tuple(stage["latent"]): total / count
        for cell, values in model["cells"].items()
        for stage, total, count in zip(
            values["plan"]["stages"], stage_flops(model, framework, cell), values["steps"], strict=True
        )
    }
