"""The autoencoder of a pipeline: it turns pixels into latents and latents into pixels."""

from pathlib import Path

import numpy as np
from flax import nnx

from jaxspd.convert import vae_image, vae_video
from jaxspd.convert.checkpoint import Checkpoint
from jaxspd.convert.loader import Tensors, flat_parameters, match, stored_parameters
from jaxspd.errors import UsageError
from jaxspd.models.vae import Coder, VaeConfig, VideoAutoencoderConfig, abstract_autoencoder
from jaxspd.runtime.memory import coding_memory
from jaxspd.runtime.residency import Residency


class Autoencoder:
    """The VAE in `folder`, run in `dtype`. Callers give and get pictures as videos of one frame.

    Raises UsageError if the file of weights is damaged or does not fit `config`. The weights are read only
    when they are needed.
    """

    def __init__(self, folder: Path, config: VaeConfig, dtype, residency: Residency):
        # Whether the VAE is made for videos. A pipeline of pictures may have one too.
        self._of_videos = isinstance(config, VideoAutoencoderConfig)
        checkpoint: Tensors
        if isinstance(config, VideoAutoencoderConfig):
            checkpoint = Checkpoint(folder)
            rules = vae_video.rules(len(config.dim_mult), config.num_res_blocks)
        else:
            checkpoint = vae_image.ImageAutoencoderCheckpoint(folder)
            rules = vae_image.rules(len(config.block_out_channels), config.layers_per_block)
        checkpoint.check_floats()
        module = abstract_autoencoder(config, dtype)
        target = residency.target
        abstract = target.abstract(nnx.state(module))
        keys = match(checkpoint, flat_parameters(abstract), rules)
        self._weights = residency.weights(folder.name, stored_parameters(checkpoint, abstract, keys))
        self._coder = Coder(module, abstract, coding_memory(target.device), target)

    def prepare(self, shape: tuple[int, ...]) -> None:
        """Compiles the programs that decode latents of `shape`, the transformer's, without tiles."""
        self._coder.prepare(self._framed(np.broadcast_to(np.float32(0), shape)).shape)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pixels `[B, F, H, W, 3]`, uint8, of the transformer's latents `[B, C, (t,) h, w]`. A picture has
        one frame. Raises UsageError unless all pixels are finite.
        """
        with self._weights.lent_to(self._coder) as coder:
            raw = coder.denormalise(self._framed(latents))
            pixels = coder.decode(raw)
        if not np.isfinite(pixels).all():
            raise UsageError(
                "the VAE makes NaN or infinity of the latents; lower guidance_scale; if that does not help, "
                "download the VAE's weights again"
            )
        pixels = np.rint((pixels + 1) * 127.5).astype(np.uint8)
        return pixels if pixels.ndim == 5 else pixels[:, None]

    def encode(self, pixels: np.ndarray, pictures: bool) -> np.ndarray:
        """Latents, float32, of pixels `[B, F, H, W, 3]`, uint8: the reverse of `decode`. They are
        `[B, C, h, w]` if `pictures`, else `[B, C, t, h, w]`.

        Encoding never uses tiles, because its result is measured. Raises UsageError if memory is too small
        for the whole, or if a latent is not finite.
        """
        scaled = pixels.astype(np.float32) / 127.5 - 1
        maps = scaled if self._of_videos else scaled[:, 0]
        with self._weights.lent_to(self._coder) as coder:
            if not coder.fits("encode", (1, *maps.shape[1:])):
                *_, height, width, _ = pixels.shape
                raise UsageError(
                    f"encoding {width}×{height} pixels needs more memory than is free; use a smaller "
                    "height and width"
                )
            latents = coder.normalise(coder.encode(maps, splits=(1, 1)))
        if not np.isfinite(latents).all():
            raise UsageError("the VAE makes NaN or infinity of a file; download the VAE's weights again")
        return latents[:, :, 0] if self._of_videos and pictures else latents

    def _framed(self, latents: np.ndarray) -> np.ndarray:
        return latents[:, :, None] if self._of_videos and latents.ndim == 4 else latents
