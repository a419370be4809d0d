"""Trains the demo's autoencoder: FLUX.1's latent layout (16 channels, 8x down), a tiny size.

    python -m jaxspd.demo.train_vae --out checkpoint/vae --pictures pictures.npy --minutes 14

Besides reconstructing pictures, the decoder learns to turn low-passed latents into small
pictures.  Progressive-resolution sampling decodes and grows such latents, and the term also
makes the latents' spectrum fall off with frequency as that of the pictures does.
"""

from __future__ import annotations

import argparse
import copy
import math
import multiprocessing
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from jaxspd.demo import landscapes

# (share of the time, crop side in pixels, batch size): crops are cheap; full pictures come last
# so that the group norms' statistics fit what the model will be used on.
PHASES = ((0.3, 64, 12), (0.4, 128, 4), (0.3, 256, 2))

RESUMED = ((0.5, 128, 4), (0.5, 256, 2))
# Weight of the small pictures: more of it makes them better and the full ones worse.
SMALL_WEIGHT = 0.15


def build(channels=(16, 32, 64, 64), layers=1, groups=8) -> AutoencoderKL:
    """An untrained AutoencoderKL without the parts that FLUX.1's lacks."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=layers,
        latent_channels=16,
        norm_num_groups=groups,
        sample_size=256,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _picture(seed: int) -> np.ndarray:
    return landscapes.sample(seed)[0]


def draw_pictures(path: Path, count: int, first_seed: int, workers: int = 2) -> np.ndarray:
    """Draws uint8 [count, 256, 256, 3] into ``path`` unless it is there; returns it mapped."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (count, 256, 256, 3)
        array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        with multiprocessing.Pool(workers) as pool:
            seeds = range(first_seed, first_seed + count)
            for i, picture in enumerate(pool.imap(_picture, seeds, chunksize=16)):
                array[i] = picture
        array.flush()
    return np.load(path, mmap_mode="r")


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W] in [-1, 1]."""
    x = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2)
    return x.contiguous().float() / 127.5 - 1


def to_pictures(x: torch.Tensor) -> np.ndarray:
    """float [N, 3, H, W] in [-1, 1] to uint8 [N, H, W, 3]."""
    x = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return x.permute(0, 2, 3, 1).contiguous().numpy()


def _dct_matrix(n: int) -> torch.Tensor:
    """Orthonormal DCT-II as a matrix [frequency, position]."""
    k, x = torch.arange(n)[:, None], torch.arange(n)[None]
    matrix = torch.cos(math.pi * k * (2 * x + 1) / (2 * n)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


def halve(latents: torch.Tensor) -> torch.Tensor:
    """Low-passes [N, C, H, W] to half the side by truncating the DCT; constants are kept."""
    for dim in (-2, -1):
        n = latents.shape[dim]
        # One side's share of the division by 2 that keeps the mean is 1 / sqrt(2).
        matrix = _dct_matrix(n // 2).T @ _dct_matrix(n)[: n // 2] / math.sqrt(2)
        latents = torch.einsum("...n,mn->...m", latents.movedim(dim, -1), matrix).movedim(-1, dim)
    return latents


def _loss(output, target, scales):
    """L1 on the values and, at several scales, on the differences of neighbours."""
    loss = F.l1_loss(output, target)
    error = output - target
    for scale in range(scales):
        dx = (error[..., :, 1:] - error[..., :, :-1]).abs().mean()
        dy = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        loss = loss + 0.3 * (dx + dy)
        if scale + 1 < scales:
            error = F.avg_pool2d(error, 2)
    return loss


def _crops(pictures, side, batch, rng):
    out = np.empty((batch, side, side, 3), np.uint8)
    room = pictures.shape[1] - side + 1
    for i in range(batch):
        y, x = rng.integers(room, size=2)
        out[i] = pictures[rng.integers(len(pictures)), y : y + side, x : x + side]
    return to_tensor(out)


def train(
    pictures,
    minutes,
    peak_lr=2e-3,
    kl_weight=5e-5,
    seed=0,
    start=None,
    decoder_only=False,
    log=print,
) -> AutoencoderKL:
    """Trains for ``minutes`` of wall time, from ``start`` if given (then on larger pieces only).

    With ``decoder_only`` latents keep their meaning.  Returns the weights' moving average.
    """
    torch.manual_seed(seed)
    phases = PHASES if start is None else RESUMED
    rng = np.random.default_rng(seed)
    vae = build() if start is None else start
    vae.encoder.requires_grad_(not decoder_only)
    ema = copy.deepcopy(vae).requires_grad_(False)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=peak_lr, betas=(0.9, 0.98))
    ends = np.cumsum([share for share, _, _ in phases])
    begin, step, progress, smooth = time.time(), 0, 0.0, None
    while progress < 1:
        _, side, batch = phases[min(int(np.searchsorted(ends, progress, "right")), len(ends) - 1)]
        lr = peak_lr * min(1, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        optimiser.param_groups[0]["lr"] = lr
        x = _crops(pictures, side, batch, rng)
        # bfloat16 convolutions took 0.6 of float32's time on the CPU this was trained on.
        with torch.autocast("cpu", torch.bfloat16):
            posterior = DiagonalGaussianDistribution(vae.encoder(x).float())
            output = vae.decode(posterior.sample()).sample.float()
            if step % 2:
                small = vae.decode(halve(posterior.mean)).sample.float()
        loss = _loss(output, x, 3)
        kl = (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean() / 2
        total = loss + kl_weight * kl
        if step % 2:
            total = total + SMALL_WEIGHT * _loss(small, F.avg_pool2d(x, 2), 2)
        optimiser.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        step += 1
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            averaged, current = list(ema.parameters()), list(vae.parameters())
            torch._foreach_lerp_(averaged, current, 1 - decay)
        progress = (time.time() - begin) / (60 * minutes)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if step % 100 == 0:
            log(f"{progress:5.1%} step {step} side {side} loss {smooth:.4f} kl {kl.item():.2f}")
    return ema.eval()


@torch.no_grad()
def encode(vae, pictures, batch=8) -> torch.Tensor:
    """Posterior means float32 [N, 16, 32, 32] of uint8 [N, 256, 256, 3], not normalised."""
    parts = range(0, len(pictures), batch)
    return torch.cat([vae.encode(to_tensor(pictures[i : i + batch])).latent_dist.mean for i in parts])


@torch.no_grad()
def decode(vae, latents, batch=8) -> np.ndarray:
    """Pictures uint8 [N, 8 H, 8 W, 3] of latents [N, 16, H, W] that are not normalised."""
    parts = range(0, len(latents), batch)
    return np.concatenate([to_pictures(vae.decode(latents[i : i + batch]).sample) for i in parts])


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each pair of uint8 pictures."""
    error = (a.astype(np.float32) - b.astype(np.float32)) ** 2
    return 10 * np.log10(255**2 / error.mean((1, 2, 3)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the autoencoder")
    parser.add_argument("--pictures", type=Path, required=True, help=".npy file to draw into")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=14)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--resume", type=Path, help="folder of an autoencoder to go on from")
    parser.add_argument("--decoder-only", action="store_true", help="with --resume: keep latents")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.time()
    pictures = draw_pictures(args.pictures, args.count, first_seed=1_000_000)
    print(f"pictures ready after {time.time() - start:.0f} s")
    resumed = None
    if args.resume:
        resumed = AutoencoderKL.from_pretrained(args.resume, torch_dtype=torch.float32).train()
    vae = train(
        pictures,
        args.minutes,
        args.lr,
        start=resumed,
        decoder_only=args.decoder_only,
        log=partial(print, flush=True),
    )
    if not args.decoder_only:
        latents = encode(vae, pictures[:300])
        vae.register_to_config(
            shift_factor=round(latents.mean().item(), 4),
            scaling_factor=round(1 / latents.std().item(), 4),
        )
    vae.half().save_pretrained(args.out)
    vae = AutoencoderKL.from_pretrained(args.out, torch_dtype=torch.float32)
    fresh = np.stack([_picture(2_000_000 + i) for i in range(64)])
    latents = encode(vae, fresh)
    small = fresh.reshape(64, 128, 2, 128, 2, 3).mean((2, 4)).round()
    print(f"shift {vae.config.shift_factor}, scale {vae.config.scaling_factor}")
    print(f"PSNR on fresh pictures: {psnr(decode(vae, latents), fresh).mean():.2f} dB")
    print(f"PSNR at half size: {psnr(decode(vae, halve(latents)), small).mean():.2f} dB")


if __name__ == "__main__":
    main()
