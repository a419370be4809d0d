"""Is the embedded demo worth looking at, and does it draw what its prompts ask for?

    python bench/demo.py

It draws one picture for each of 100 fresh captions and seeds, at full resolution and progressively, and
measures them beside drawings of the same captions. `bench/training/attributes.py` checks time of day, ground
and snow. `bench/sharpness.py` measures power in bands of frequency, blocks, the skyline and the lake's mirror
image. The drawings are also measured after a pass through the autoencoder alone. Figures and a contact sheet
go to `bench/results/demo/`. `bench/quality.py` measures the Fréchet distance.
"""

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import metrics
import numpy as np
import sharpness
from PIL import Image
from training.attributes import detect
from training.landscapes import describe, draw

from jaxspd import DiffGenerator
from jaxspd.components.pipeline import Components
from jaxspd.hub import DEMO, fetch

RESULTS = Path(__file__).parent / "results" / "demo"
# The captions come from seeds that neither the training pictures nor the check's own have used.
FIRST_SEED = 4_000_000
ATTRIBUTES = ("time", "ground", "snow")


def share_found(pictures: np.ndarray, scenes: list) -> dict[str, float]:
    """The share of pictures in which each attribute, and all three at once, are as the caption says."""
    right = np.array(
        [
            [getattr(found, name) == getattr(asked, name) for name in ATTRIBUTES]
            for found, asked in zip(detect(pictures), scenes, strict=True)
        ]
    )
    return {**dict(zip(ATTRIBUTES, right.mean(0).tolist(), strict=True)), "all": float(right.all(1).mean())}


def measure(pictures: np.ndarray, drawings: np.ndarray, scenes: list) -> dict:
    """All measures of one set of pictures, beside drawings of the same scenes."""
    lake = np.array([scene.ground == "lake" for scene in scenes])
    return {
        "found": share_found(pictures, scenes),
        "decibels": sharpness.band_decibels(pictures, drawings),
        "blocks": sharpness.block_ratio(pictures),
        "skyline": float(sharpness.skyline_contrast(pictures).mean()),
        "mirror": float(sharpness.mirror_correlation(pictures[lake]).mean()),
        "mirror_of_meadows": float(sharpness.mirror_correlation(pictures[~lake]).mean()),
    }


def autoencoded(family, drawings: np.ndarray) -> np.ndarray:
    """The drawings, encoded and decoded by the checkpoint's VAE."""
    components = Components(family, jnp.float32)
    latents = np.concatenate([components.encode(picture[None, None]) for picture in drawings])
    return components.decode(latents)[:, 0]


def contact_sheet(columns: list[np.ndarray], rows: int) -> Image.Image:
    """A sheet with a column for each of `columns`: the first `rows` of its pictures `[N, H, W, 3]`."""
    return Image.fromarray(np.concatenate([np.concatenate(column[:rows]) for column in columns], axis=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--model-path", help="another checkpoint than the embedded one")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    args = parser.parse_args()

    scenes, captions, draws = zip(*(describe(FIRST_SEED + i) for i in range(args.count)), strict=True)
    drawings = np.stack([draw(scene, rng) for scene, rng in zip(scenes, draws, strict=True)])
    family = fetch(args.model_path)
    folder, rendered = family.folder, autoencoded(family, drawings)
    report = {
        "hardware": f"{platform.machine()}, {jax.device_count()} {jax.devices()[0].device_kind} device",
        "versions": {name: version(name) for name in ("jax", "flax", "torch", "diffusers")},
        "count": args.count,
        "weight_bytes": sum(path.stat().st_size for path in folder.rglob("*.safetensors")),
        "drawings": measure(drawings, drawings, list(scenes)),
        "autoencoder": {
            "psnr": float(metrics.psnr(rendered, drawings).mean()),
            **measure(rendered, drawings, list(scenes)),
        },
        "modes": {},
    }
    print("drawings", report["drawings"], "autoencoder", report["autoencoder"], sep="\n", flush=True)
    generator, columns = DiffGenerator.from_pretrained(None if folder == DEMO else folder), [drawings]
    for mode in ("fullres", "dct_rewind"):
        pictures, seconds = [], np.zeros(2)
        for number, caption in enumerate(captions):
            request = {"prompt": caption, "seed": FIRST_SEED + number, "progressive_mode": mode}
            result = generator.generate(
                {**request, "progressive_delta": args.delta}, save_output=False, show_progress=False
            )
            pictures.append(np.asarray(result.images[0]))
            seconds += sum(result.seconds["denoise"]), result.seconds["decode"]
        columns.append(np.stack(pictures))
        report["modes"][mode] = {
            **measure(columns[-1], drawings, list(scenes)),
            "seconds_per_picture": dict(
                zip(("denoise", "decode"), (seconds / args.count).tolist(), strict=True)
            ),
            "plan": result.plan,
        }
        print(mode, {k: v for k, v in report["modes"][mode].items() if k != "plan"}, flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "check.json").write_text(json.dumps(report, indent=2) + "\n")
    contact_sheet(columns, 8).save(args.output / "sheet.jpg", quality=90)


if __name__ == "__main__":
    main()
