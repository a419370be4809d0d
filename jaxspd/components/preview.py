"""A quick look at latents: a colour for each, by a linear map."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.fft import idctn

# Pictures that the map is fitted on, and their sides in latents: far more equations than the 129 unknowns of
# FLUX.2's 128 channels.
PICTURES, SIDE = 4, 32
# Spread of their colours, of 255: much of the gamut, with little that has to be cut off.
SPREAD = 80

Pixels = np.ndarray
Latents = np.ndarray


@dataclass(frozen=True)
class Preview:
    """`weights` `[C, 3]` and `offset` `[3]`, from latents to the mean colour, 0 to 255, of their pixels."""

    weights: np.ndarray
    offset: np.ndarray

    def __call__(self, latents: Latents) -> Pixels:
        """Pixels `[t, h, w, 3]`, uint8, one for each of clean latents `[1, C, (t,) h, w]`; t is 1 for a
        picture.
        """
        colours = np.moveaxis(latents[0], 0, -1) @ self.weights + self.offset
        pixels = np.rint(np.clip(colours, 0, 255)).astype(np.uint8)
        return pixels if pixels.ndim == 4 else pixels[None]


def fit(
    encode: Callable[[Pixels], Latents], decode: Callable[[Latents], Pixels], pixels_per_latent: int
) -> Preview:
    """The map nearest, in least squares, to a VAE's own decoding of pictures that it has encoded.

    Pixels are `[1, 1, H, W, 3]`, uint8, latents `[1, C, (1,) h, w]`. The pictures are random colours with the
    power spectrum of natural ones, 1/ω² (Field 1987, doi 10.1364/JOSAA.4.002379), so that any VAE can be
    fitted without data, and the same one gives the same map.
    """
    side, draw = SIDE * pixels_per_latent, np.random.default_rng(0)
    omega = np.hypot(*np.ogrid[:side, :side])
    omega[0, 0] = 0.5
    known, wanted = [], []
    for _ in range(PICTURES):
        noise = draw.standard_normal((3, side, side))
        fields = idctn(noise / omega, axes=(1, 2), norm="ortho")
        fields *= SPREAD / fields.std(axis=(1, 2), keepdims=True)
        picture = np.rint(np.clip(127.5 + fields, 0, 255)).astype(np.uint8)
        latents = encode(np.moveaxis(picture, 0, -1)[None, None])
        decoded = decode(latents)[0, 0].reshape(SIDE, pixels_per_latent, SIDE, pixels_per_latent, 3)
        known.append(np.moveaxis(latents[0], 0, -1).reshape(SIDE * SIDE, -1))
        wanted.append(decoded.mean((1, 3)).reshape(SIDE * SIDE, 3))
    channels = np.pad(np.concatenate(known).astype(np.float64), ((0, 0), (0, 1)), constant_values=1)
    solved = np.linalg.lstsq(channels, np.concatenate(wanted), rcond=None)[0].astype(np.float32)
    return Preview(solved[:-1], solved[-1])
