"""Measures of how sharp pictures are, beside drawings of the same captions.

Pictures are `[N, H, W, 3]`, uint8.
"""

import numpy as np
from metrics import LUMINANCE, power_spectra
from training.autoencoder import BLOCK

# Bands of frequency in cycles per image.
BANDS = ((4, 16), (16, 40), (40, 80), (80, 128))
# The rows in which a ridge may lie, and those in which the shore lies, as shares of the height.
RIDGE_ROWS, SHORE_ROWS = (0.12, 0.66), (0.57, 0.67)
# The most rows by which a ridge rises or falls from one column to the next.
STEEPEST = 4
# The height of the strips that are compared above and below the shore, as a share of the picture's.
MIRRORED = 0.25


def band_decibels(pictures: np.ndarray, drawings: np.ndarray) -> dict[str, float]:
    """The power of the pictures' luminance divided by the drawings', in each of `BANDS`, in dB."""
    omega, power = power_spectra(pictures)
    _, reference = power_spectra(drawings)
    found = {}
    for low, high in BANDS:
        band = (omega >= low) & (omega < high)
        ratio = power[:, band].sum() / reference[:, band].sum()
        found[f"{low}-{high}"] = float(10 * np.log10(ratio))
    return found


def block_ratio(pictures: np.ndarray) -> float:
    """How strongly blocks of 8 pixels show: 1 where nothing repeats every 8 pixels.

    It is the largest mean difference of neighbours at one place modulo 8, divided by the mean over all
    places, for the worse of rows and columns.
    """
    grey = pictures.astype(np.float32) @ LUMINANCE
    ratios = []
    for axis in (1, 2):
        change = np.abs(np.diff(grey, axis=axis)).mean((0, 3 - axis))
        places = np.array([change[place::BLOCK].mean() for place in range(BLOCK)])
        ratios.append(places.max() / places.mean())
    return float(max(ratios))


def skyline_contrast(pictures: np.ndarray) -> np.ndarray:
    """How strongly the ridge stands out from what is behind it, `[N]`.

    It is the mean step of colour across the ridge, from two pixels above to two below, as a share of the full
    range. The ridge is the path from left to right with the strongest steps, found as in seam carving. A
    blurred ridge spreads its step over more pixels.
    """
    colour = np.asarray(pictures, np.float32) / 255
    pairs = (colour[:, :-1] + colour[:, 1:]) / 2
    step = np.linalg.norm(pairs[:, 2:] - pairs[:, :-2], axis=-1)  # [N, H - 3, W]
    height = pictures.shape[1]
    step = step[:, int(RIDGE_ROWS[0] * height) : int(RIDGE_ROWS[1] * height)]
    best = step[:, :, 0]
    for column in range(1, step.shape[2]):
        padded = np.pad(best, ((0, 0), (STEEPEST, STEEPEST)), constant_values=-np.inf)
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * STEEPEST + 1, axis=1)
        best = step[:, :, column] + windows.max(-1)
    return best.max(1) / step.shape[2]


def mirror_correlation(pictures: np.ndarray) -> np.ndarray:
    """How well the strip below the shore mirrors the strip above it, `[N]`.

    It is the correlation of the two, at the row of the shore where that is highest. Each row's mean is
    subtracted, so that a sky that is darker at the top does not count.
    """
    grey = np.asarray(pictures, np.float32) @ LUMINANCE
    n, height, width = grey.shape
    grey = grey.reshape(n, height // 2, 2, width // 4, 4).mean((2, 4))
    grey = grey - grey.mean(2, keepdims=True)
    rows, tall = height // 2, int(MIRRORED * height / 2)
    found = []
    for shore in range(int(SHORE_ROWS[0] * rows), int(SHORE_ROWS[1] * rows) + 1):
        above, below = grey[:, shore - tall : shore][:, ::-1], grey[:, shore : shore + tall]
        size = np.sqrt((above**2).sum((1, 2)) * (below**2).sum((1, 2)))
        found.append((above * below).sum((1, 2)) / (size + 1e-6))
    return np.max(found, 0)
