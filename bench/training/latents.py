"""Draws and encodes the pictures on which the demo's transformer is trained.

    cd bench && python -m training.latents --state DIR --shards 16

This writes shards `latents/0000.npy`, … below DIR. Each holds the latents of 1,000 drawings and of their
mirror images as float16 [2000, 16, 32, 32], normalised as (mean - shift) * scale. It also writes `text.npz`,
once, with the features of every caption. The encoder is the one in DIR/vae, or the demo's if there is none.
Existing shards are kept.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from jaxspd.hub import DEMO
from training import landscapes
from training.autoencoder import encode, half_precision
from training.text import encode_text

SHARD = 1000  # drawings
FIRST_SEED = 0
SEEDS = 100_000  # captions of these seeds get features: more than will be drawn


def write_text(out: Path) -> None:
    """Writes `text.npz`: the unique captions, with the empty one first, their T5 states and their CLIP
    vectors.
    """
    captions = ["", *sorted({landscapes.describe(FIRST_SEED + i)[1] for i in range(SEEDS)})]
    states, pooled = encode_text(DEMO, captions)
    part = out / "text.part.npz"
    np.savez(part, captions=captions, t5=states.astype(np.float16), clip=pooled.astype(np.float16))
    os.replace(part, out / "text.npz")


def shard_seeds(number: int) -> range:
    """The seeds of a shard's drawings."""
    return range(FIRST_SEED + number * SHARD, FIRST_SEED + (number + 1) * SHARD)


@torch.inference_mode()
def write_shard(vae: AutoencoderKL, out: Path, number: int) -> None:
    """Draws and encodes one shard: each drawing, then its mirror image."""
    rows = []
    for seed in shard_seeds(number):
        picture = landscapes.sample(seed)[0]
        with half_precision():
            rows.append(encode(vae, np.stack([picture, picture[:, ::-1]])).float())
    config = vae.config
    latents = (torch.cat(rows) - config.shift_factor) * config.scaling_factor
    part = out / f"{number:04d}.part.npy"
    np.save(part, latents.half().numpy())
    os.replace(part, out / f"{number:04d}.npy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state", type=Path, required=True, help="folder of the training's state")
    parser.add_argument("--shards", type=int, default=16, help="shards of 1,000 drawings")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = args.state / "latents"
    out.mkdir(parents=True, exist_ok=True)
    if not (args.state / "text.npz").exists():
        write_text(args.state)
    folder = args.state if (args.state / "vae").exists() else DEMO
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
    for number in range(args.shards):
        if not (out / f"{number:04d}.npy").exists():
            begin = time.time()
            write_shard(vae, out, number)
            print(f"shard {number} in {time.time() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
