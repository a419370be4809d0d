"""Measures the power spectrum of the demo's latents and stores its fit with the checkpoint.

python -m jaxspd.demo.fit_spectrum --data DIR --checkpoint DIR
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.fft import dctn


def radial_power(latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean power of the orthonormal DCT coefficients of `latents` `[N, C, H, W]` at each whole
    frequency from 1 to the grid's Nyquist frequency, in cycles per image.

    Basis function k of a DCT completes k/2 cycles across the image.
    """
    height, width = latents.shape[-2:]
    power = np.zeros((height, width))
    for part in np.array_split(latents, max(1, len(latents) // 256)):
        power += (dctn(part.astype(np.float32), axes=(-2, -1), norm="ortho") ** 2).mean(1).sum(0)
    power /= len(latents)
    omega = np.hypot(np.arange(height)[:, None], np.arange(width)) / 2
    whole = np.arange(1, min(height, width) // 2 + 1)
    ring = np.round(omega)
    return whole, np.array([power[ring == w].mean() for w in whole])


def fit_power_law(omega: np.ndarray, power: np.ndarray) -> tuple[float, float]:
    """(A, β) of `P = A·ω^-β` by least squares of the logarithms."""
    slope, intercept = np.polyfit(np.log(omega), np.log(power), 1)
    return float(np.exp(intercept)), float(-slope)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    args = parser.parse_args()
    latents = np.load(args.data / "latents.npy", mmap_mode="r")[:4096]
    omega, power = radial_power(latents)
    amplitude, exponent = fit_power_law(omega, power)
    for w, p in zip(omega, power, strict=True):
        print(f"{w:3d}  {p:9.4f}  fit {amplitude * w**-exponent:9.4f}")
    values = {"amplitude": round(amplitude, 6), "exponent": round(exponent, 6)}
    (args.checkpoint / "spectrum.json").write_text(json.dumps(values) + "\n")
    print(values)


if __name__ == "__main__":
    main()
