"""Quick previews of latents: a linear map gives one colour per latent."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.fft import idctn

# Number of pictures that the map is fitted to, and their side in latents. They give far more equations than
# the 129 unknowns of FLUX.2's 128 channels.
PICTURES, SIDE = 4, 32
# Standard deviation of the pictures' colours, of 255: they cover much of the gamut, and few are clipped.
SPREAD = 80

Pixels = np.ndarray
Latents = np.ndarray


@dataclass(frozen=True)
class Preview:
    """A linear map from latents to the mean colour of their pixels, 0 to 255: `weights` `[C, 3]` and `offset`
    `[3]`.
    """

    weights: np.ndarray
    offset: np.ndarray

    def __call__(self, latents: Latents) -> Pixels:
        """Pixels `[t, h, w, 3]`, uint8, one per latent, of clean latents `[1, C, (t,) h, w]`. A picture has t
        = 1.
        """
        colours = np.moveaxis(latents[0], 0, -1) @ self.weights + self.offset
        pixels = np.rint(np.clip(colours, 0, 255)).astype(np.uint8)
        return pixels if pixels.ndim == 4 else pixels[None]


def fit(
    encode: Callable[[Pixels], Latents], decode: Callable[[Latents], Pixels], pixels_per_latent: int
) -> Preview:
    """The linear map that is nearest, in least squares, to a VAE's decoding of pictures that it has encoded.

    `encode` takes pixels `[1, 1, H, W, 3]`, uint8, and gives latents `[1, C, (1,) h, w]`; `decode` is the
    reverse. The pictures have random colours with the power spectrum of natural pictures, 1/ω² (Field 1987,
    doi 10.1364/JOSAA.4.002379). So every VAE can be fitted without data, and the same VAE always gives the
    same map.
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
