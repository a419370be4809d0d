"""Finds time of day, ground and snow in pictures, to check that samples follow their prompts.

It is a linear (ridge) classifier on colours, colour histograms and local contrast. Colours depend on the time
of day, so ground and snow have separate weights for every time.

    python -m training.attributes --vae checkpoint/vae

This fits the weights that ship beside this file and prints how often they are right.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path

import numpy as np

from training.landscapes import GROUNDS, TIMES, Scene, sample

WEIGHTS = Path(__file__).with_name("attributes.npz")
_BINS = 6
# Bands of rows, in eighths of the height, whose colours are counted: peaks, slopes and ground.
_BANDS = ((1, 3), (2, 4), (3, 5), (4, 6), (6, 8))


def _pool(x: np.ndarray, side: int) -> np.ndarray:
    """Averages [N, H, W, C] over square blocks to [N, side, side, C]."""
    n, height, width, channels = x.shape
    x = x.reshape(n, side, height // side, side, width // side, channels)
    return x.mean((2, 4))


def _histogram(x: np.ndarray) -> np.ndarray:
    """Soft counts [N, bins] of pixels [N, P, 3] in brightness, blue minus red and green."""
    brightness = x.mean(-1)
    scale = brightness + 0.15
    warmth = np.clip(0.5 + 0.5 * (x[..., 2] - x[..., 0]) / scale, 0, 1)
    green = np.clip(0.5 + (x[..., 1] - (x[..., 0] + x[..., 2]) / 2) / scale, 0, 1)
    # The square root gives more bins to the dark tones of night pictures.
    axes = (np.sqrt(np.clip(brightness, 0, 1)), warmth, green)
    # Triangular membership in evenly spaced bins, so that counts change smoothly.
    centres = np.linspace(0, 1, _BINS, dtype=np.float32)
    soft = [np.maximum(1 - np.abs(a[..., None] - centres) * (_BINS - 1), 0) for a in axes]
    pairs = [(0, 1), (0, 2), (1, 2)]
    counts = [np.einsum("npi,npj->nij", soft[i], soft[j]) for i, j in pairs]
    return np.stack(counts, 1).reshape(len(x), -1) / x.shape[1]


def features(pictures: np.ndarray) -> np.ndarray:
    """Features float32 [N, F] of pictures uint8 [N, 256, 256, 3]."""
    x = _pool(np.asarray(pictures, np.float32) / 255, 64)
    rows = len(x[0]) // 8
    parts = [
        np.sqrt(np.sqrt(_histogram(x[:, a * rows : b * rows].reshape(len(x), -1, 3)) + 1e-4))
        for a, b in _BANDS
    ]
    parts.append(_pool(x, 8).reshape(len(x), -1))
    grey = x.mean(-1, keepdims=True)
    for axis in (1, 2):  # tells horizontal ripples from upright grass
        change = np.abs(np.diff(grey, axis=axis, append=np.take(grey, [-1], axis)))
        parts.append(np.log(_pool(change, 8).reshape(len(x), -1) + 3e-3))
    # Mirror symmetry around possible horizons: water reflects what is above it.
    for horizon in range(36, 45, 2):
        above, below = grey[:, horizon - 14 : horizon][:, ::-1], grey[:, horizon : horizon + 14]
        above = above - above.mean((1, 2), keepdims=True)
        below = below - below.mean((1, 2), keepdims=True)
        norm = np.sqrt((above**2).sum((1, 2, 3)) * (below**2).sum((1, 2, 3))) + 1e-3
        parts.append(((above * below).sum((1, 2, 3)) / norm)[:, None])
    return np.concatenate(parts, 1).astype(np.float32)


def _labels(scenes) -> tuple[np.ndarray, np.ndarray]:
    """The index of the time [N], and ground and snow as -1 or 1 [N, 2]: -1 is a lake and no snow."""
    time = np.array([TIMES.index(scene.time) for scene in scenes])
    rest = [[2 * GROUNDS.index(scene.ground) - 1, 2 * scene.snow - 1] for scene in scenes]
    return time, np.array(rest, np.float32)


def _ridge(x, y, strength):
    """Weights [F + 1, K] of a regression on standardised x [N, F]; the offset is the last row."""
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    penalty = np.full(x.shape[1], strength * len(x))
    penalty[-1] = 0
    return np.linalg.solve(x.T @ x + np.diag(penalty), x.T @ y)


def fit(pictures: np.ndarray, scenes: list[Scene], strength: float = 3e-3) -> dict:
    """Fits the classifier to pictures uint8 [N, 256, 256, 3]; returns its arrays."""
    x = np.concatenate([features(pictures[i : i + 64]) for i in range(0, len(pictures), 64)])
    mean, std = x.mean(0), x.std(0) + 1e-3
    x = ((x - mean) / std).astype(np.float64)
    time, rest = _labels(scenes)
    return {
        "mean": mean,
        "std": std,
        "time": _ridge(x, np.eye(len(TIMES))[time], strength).astype(np.float32),
        "rest": np.stack([_ridge(x[time == k], rest[time == k], strength) for k in range(len(TIMES))]).astype(
            np.float32
        ),
    }


@cache
def _shipped() -> dict:
    with np.load(WEIGHTS) as arrays:
        return dict(arrays)


def detect(pictures: np.ndarray, weights: dict | None = None) -> list[Scene]:
    """The scene in each of the pictures uint8 [N, 256, 256, 3]."""
    weights = _shipped() if weights is None else weights
    scenes = []
    for start in range(0, len(pictures), 64):
        x = (features(pictures[start : start + 64]) - weights["mean"]) / weights["std"]
        x = np.concatenate([x, np.ones((len(x), 1), np.float32)], 1)
        times = (x @ weights["time"]).argmax(1)
        for row, time in zip(x, times, strict=True):
            meadow, snow = row @ weights["rest"][time] > 0
            scenes.append(Scene(TIMES[time], GROUNDS[int(meadow)], bool(snow)))
    return scenes


def accuracy(pictures: np.ndarray, scenes: list[Scene], weights: dict | None = None) -> dict:
    """The share of pictures with each attribute right, and with all of them right."""
    found = detect(pictures, weights)
    names = ("time", "ground", "snow")
    right = [[getattr(a, n) == getattr(b, n) for n in names] for a, b in zip(found, scenes, strict=True)]
    right = np.array(right)
    return {
        **dict(zip(names, right.mean(0).tolist(), strict=True)),
        "all": float(right.all(1).mean()),
    }


def _worsened(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The pictures blurred, with noise, and a little brighter or darker, like samples of a small model."""
    from scipy.ndimage import gaussian_filter

    out = np.empty_like(pictures)
    for i, picture in enumerate(pictures):
        sigma = rng.uniform(0, 2.5)
        x = gaussian_filter(picture.astype(np.float32), (sigma, sigma, 0))
        x += rng.standard_normal(x.shape, dtype=np.float32) * rng.uniform(0, 14)
        out[i] = np.clip(x * rng.uniform(0.88, 1.12) + rng.uniform(-5, 5), 0, 255)
    return out


def main() -> None:
    import torch
    from diffusers import AutoencoderKL

    from training.autoencoder import decode, encode

    parser = argparse.ArgumentParser(description="Fits the attribute check.")
    parser.add_argument("--vae", type=Path, required=True, help="folder of the autoencoder")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--first-seed", type=int, default=3_000_000)
    args = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32).eval()
    drawn = [sample(args.first_seed + i) for i in range(args.count + 400)]
    pictures = np.stack([picture for picture, _, _ in drawn])
    scenes = [scene for _, _, scene in drawn]
    # Every fourth picture of the fit, and all pictures of the test, are also used as the autoencoder decodes
    # them.
    some = [*range(0, args.count, 4), *range(args.count, args.count + 400)]
    decoded = decode(vae, encode(vae, pictures[some], batch=4), batch=4)
    fitted, tested = pictures[: args.count], pictures[args.count :]
    rng = np.random.default_rng(0)
    variants = [fitted, decoded[:-400], _worsened(fitted, rng), _worsened(decoded[:-400], rng)]
    fit_scenes, test_scenes = scenes[: args.count], scenes[args.count :]
    weights = fit(np.concatenate(variants), (fit_scenes + fit_scenes[::4]) * 2)
    np.savez_compressed(WEIGHTS, **weights)
    for name, test in (
        ("drawings", tested),
        ("autoencoded", decoded[-400:]),
        ("worsened", _worsened(decoded[-400:], rng)),
    ):
        print(name, {k: round(v, 4) for k, v in accuracy(test, test_scenes).items()})


if __name__ == "__main__":
    main()
