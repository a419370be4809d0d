"""Does the embedded demo draw what its prompts ask for, progressively as well as at full resolution?

    python bench/demo.py

draws one picture for each of 100 fresh captions and seeds, in `fullres` and in `dct_rewind`, looks for
time of day, ground and snow with the check in `bench/training/attributes.py`, and writes figures and a
contact sheet to `bench/results/demo/`.
"""

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from training.attributes import detect
from training.landscapes import describe

from jaxspd import DiffGenerator

RESULTS = Path(__file__).parent / "results" / "demo"
# Captions of seeds that neither the training pictures nor the check's own have used.
FIRST_SEED = 4_000_000
ATTRIBUTES = ("time", "ground", "snow")


def share_found(pictures: np.ndarray, scenes: list) -> dict[str, float]:
    """Share of pictures in which each attribute, and all three at once, are as asked."""
    right = np.array(
        [
            [getattr(found, name) == getattr(asked, name) for name in ATTRIBUTES]
            for found, asked in zip(detect(pictures), scenes, strict=True)
        ]
    )
    return {**dict(zip(ATTRIBUTES, right.mean(0).tolist(), strict=True)), "all": float(right.all(1).mean())}


def contact_sheet(columns: list[np.ndarray], rows: int) -> Image.Image:
    """Pictures `[N, H, W, 3]` of each column, the first `rows` × 4 of them, at half size."""
    sheet = []
    for row in range(rows):
        picked = [c[4 * row + i] for c in columns for i in range(4)]
        sheet.append(np.concatenate(picked, axis=1))
    image = Image.fromarray(np.concatenate(sheet))
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--model-path", help="another checkpoint than the embedded one")
    args = parser.parse_args()

    scenes, captions = zip(*(describe(FIRST_SEED + i)[:2] for i in range(args.count)), strict=True)
    generator = DiffGenerator.from_pretrained(args.model_path)
    report = {
        "hardware": f"{platform.machine()}, {jax.device_count()} {jax.devices()[0].device_kind} device",
        "versions": {name: version(name) for name in ("jax", "flax", "torch", "diffusers")},
        "count": args.count,
        "modes": {},
    }
    columns = []
    for mode in ("fullres", "dct_rewind"):
        pictures, seconds = [], 0.0
        for number, caption in enumerate(captions):
            request = {"prompt": caption, "seed": FIRST_SEED + number, "progressive_mode": mode}
            result = generator.generate(
                {**request, "progressive_delta": args.delta}, save_output=False, show_progress=False
            )
            pictures.append(np.asarray(result.images[0]))
            seconds += sum(result.seconds["denoise"])
        columns.append(np.stack(pictures))
        report["modes"][mode] = {
            "found": share_found(columns[-1], list(scenes)),
            "denoise_seconds_per_picture": round(seconds / args.count, 3),
            "plan": result.plan,
        }
        print(mode, report["modes"][mode]["found"], flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "check.json").write_text(json.dumps(report, indent=2) + "\n")
    contact_sheet(columns, 6).save(RESULTS / "sheet.jpg", quality=88)


if __name__ == "__main__":
    main()
