"""Precomputes what the demo's transformer is trained on: latents and frozen text features.

    python -m jaxspd.demo.train_data --checkpoint checkpoint --out data --count 12000

writes ``latents.npy`` float16 [N, 16, 32, 32], normalised as (mean - shift) * scale;
``captions.json``, the N captions; ``t5.npy`` [M, 32, 128] and ``clip.npy`` [M, 128], float16
features of the M unique captions, row 0 being the empty prompt; and ``caption_index.npy`` [N],
each picture's row in them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from functools import partial
from pathlib import Path

import numpy as np

from jaxspd.demo import landscapes

_vae = None


def write_text_features(checkpoint: Path, out: Path, captions: list[str]) -> None:
    """Writes ``captions.json``, ``t5.npy``, ``clip.npy`` and ``caption_index.npy``."""
    from jaxspd.demo.text import encode_text

    unique = ["", *sorted(set(captions))]
    row = {caption: index for index, caption in enumerate(unique)}
    states, pooled = encode_text(checkpoint, unique)
    np.save(out / "t5.npy", states.astype(np.float16))
    np.save(out / "clip.npy", pooled.astype(np.float16))
    np.save(out / "caption_index.npy", np.array([row[c] for c in captions], np.int32))
    (out / "captions.json").write_text(json.dumps(captions))


def _load_vae(folder):
    import torch
    from diffusers import AutoencoderKL

    global _vae
    torch.set_num_threads(1)  # one process per core instead
    _vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()


def _latents(seeds, autocast):
    """Normalised latents float16 [len(seeds), 16, 32, 32] of the pictures drawn for ``seeds``."""
    import torch

    from jaxspd.demo.train_vae import encode

    pictures = np.stack([landscapes.sample(seed)[0] for seed in seeds])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mean = encode(_vae, pictures, batch=4)
    config = _vae.config
    return ((mean.float() - config.shift_factor) * config.scaling_factor).half().numpy()


def write_latents(checkpoint, out, seeds, workers=2, autocast=False, log=print) -> None:
    """Draws and encodes the pictures of ``seeds`` into ``latents.npy``."""
    shape = (len(seeds), 16, 32, 32)
    array = np.lib.format.open_memmap(out / "latents.npy", "w+", np.float16, shape)
    chunks = [seeds[i : i + 16] for i in range(0, len(seeds), 16)]
    start, done = time.time(), 0
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _load_vae, (checkpoint / "vae",)) as pool:
        for latents in pool.imap(partial(_latents, autocast=autocast), chunks):
            array[done : done + len(latents)] = latents
            done += len(latents)
            if done % 800 == 0:
                array.flush()
                log(f"{done} of {len(seeds)} after {time.time() - start:.0f} s")
    array.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=12000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--autocast", action="store_true", help="encode in bfloat16")
    parser.add_argument("--skip-latents", action="store_true", help="text features only")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    seeds = list(range(args.first_seed, args.first_seed + args.count))
    captions = [landscapes.describe(seed)[1] for seed in seeds]
    write_text_features(args.checkpoint, args.out, captions)
    if not args.skip_latents:
        write_latents(
            args.checkpoint,
            args.out,
            seeds,
            args.workers,
            args.autocast,
            log=partial(print, flush=True),
        )


if __name__ == "__main__":
    main()
