"""Tiles that cover a map and overlap, and the weights that blend them."""

from math import ceil

import numpy as np

# Smallest overlap of neighbouring tiles, in latents: 64 pixels of a picture, as in the official code.
OVERLAP = 8


def can_split(length: int, count: int) -> bool:
    """Whether each of `count` tiles along `length` latents is at least twice as long as the overlap."""
    return count == 1 or tile_length(length, count) >= 2 * OVERLAP


def tile_length(length: int, count: int) -> int:
    """The length in latents of each of `count` equal, overlapping tiles that cover `length`."""
    return ceil((length + (count - 1) * OVERLAP) / count)


def starts(length: int, count: int) -> list[int]:
    """The first latent of each tile. Tiles are evenly spread, and the last one ends with the map."""
    rest = length - tile_length(length, count)
    return [round(number * rest / max(1, count - 1)) for number in range(count)]


def weights(length: int, count: int, scale: int) -> np.ndarray:
    """Each tile's weights along one axis, `[count, scale * tile]`, float32, with `scale` points per latent.

    Where two tiles overlap, one fades out linearly while the other fades in. Everywhere the weights add up to
    one.
    """
    tile = scale * tile_length(length, count)
    begins = [scale * start for start in starts(length, count)]
    whole = np.zeros((count, scale * length))
    places = np.arange(tile) + 0.5
    for number, begin in enumerate(begins):
        fade = np.ones(tile)
        if number > 0:
            fade = np.minimum(fade, places / (begins[number - 1] + tile - begin))
        if number < count - 1:
            fade = np.minimum(fade, places[::-1] / (begin + tile - begins[number + 1]))
        whole[number, begin : begin + tile] = fade
    whole /= whole.sum(0)
    return np.stack(
        [row[begin : begin + tile] for row, begin in zip(whole, begins, strict=True)], dtype=np.float32
    )
