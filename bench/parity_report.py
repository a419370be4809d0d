"""The table and the verdict of what `parity.py` found."""

from collections.abc import Iterable

from compare_report import head, row

LOOP = "whole loop"
# Bounds of relative distances in float32, as in the tests of tiny models: for one prediction, and for a loop,
# where errors add up.
BOUND, LOOP_BOUND = 1e-5, 1e-4
# In bfloat16, the largest distance of jaxspd from float32, as a multiple of PyTorch's.
MOST = 1.2
ABOUT = f"""\
Relative distances, ‖a - b‖ / ‖b‖. Both sides have the same random weights and text; float32 is without TF32.
The judge is PyTorch in float32. In float32 jaxspd must lie within {BOUND:g} of it, {LOOP_BOUND:g} after a
whole loop; in bfloat16 it may be {MOST:g} times as far from it as PyTorch is. In a loop of FLUX.1, FLUX.2 or
Qwen-Image that is much: PyTorch in bfloat16 rounds the noise level too, and jaxspd does not. Noise level and
guidance of single velocities are such that there is nothing to round."""


def cases(report: dict) -> Iterable[tuple[str, str, dict]]:
    """Yields (part, case, distances) for every case."""
    for part, found in report["parts"].items():
        for case, values in found["cases"].items():
            yield part, case, values


def wrong(report: dict) -> list[str]:
    """A line for each part that failed, and for each case that is out of bounds or NaN."""
    lines = [f"{part}: {why}" for part, why in report["failed"].items()]
    for part, case, values in cases(report):
        bound = LOOP_BOUND if case.startswith(LOOP) else BOUND
        if not values["float32"] <= bound:
            lines.append(f"{part}, {case}: {values['float32']:.2g} from PyTorch in float32, above {bound:g}")
        if not values["ratio"] <= MOST:
            lines.append(
                f"{part}, {case}: in bfloat16 {values['ratio']:.2f} times as far from float32 as PyTorch, "
                f"above {MOST:g}"
            )
    return lines


def markdown(report: dict) -> str:
    """The verdict and all cases."""
    failed = wrong(report)
    numbers = [values["ratio"] for _, _, values in cases(report)]
    fused = report["parts"].get("attention", {}).get("cudnn")
    lines = [
        f"# Parity with PyTorch on {report['hardware']}",
        "",
        ", ".join(f"{name} {number}" for name, number in report["versions"].items()) + ".",
        f"Attention in bfloat16 {'ran' if fused else 'did not run'} through cuDNN.",
        "",
        ABOUT,
        "",
        f"**{f'{len(failed)} wrong' if failed else 'All within bounds'}**: {len(numbers)} cases, the largest "
        f"ratio {max(numbers, default=0):.3f}.",
        *[f"- {line}" for line in failed],
        "",
        *head(
            "part",
            "case",
            "float32, jaxspd",
            "bfloat16, jaxspd",
            "bfloat16, PyTorch",
            "ratio",
            "bfloat16, jaxspd from PyTorch",
        ),
    ]
    for part, case, values in cases(report):
        found = [f"{values[key]:.2g}" for key in ("float32", "jax", "torch")]
        lines.append(row([part, case, *found, f"{values['ratio']:.3f}", f"{values['apart']:.2g}"]))
    sizes = [
        f"{part}: {found['parameters'] / 1e6:,.0f} M parameters; "
        + ", ".join(f"{key} {value}" for key, value in found["request"].items() if value is not None)
        for part, found in report["parts"].items()
        if "request" in found
    ]
    skipped = [f"{name}: skipped, {why}" for name, why in report["skipped"].items()]
    return "\n".join([*lines, "", *[f"- {line}" for line in sizes + skipped]]) + "\n"
