"""What works beside the transformer of one pipeline, opened when it is first needed."""

from collections.abc import Sequence
from functools import cached_property, partial
from threading import RLock
from typing import Any

import numpy as np

from jaxspd.components.autoencoder import Autoencoder
from jaxspd.components.preview import Preview, fit
from jaxspd.components.text_encoder import TextEncoder
from jaxspd.convert.lora import Merged, changes, text_model
from jaxspd.convert.lora_file import LoraFile
from jaxspd.errors import UsageError
from jaxspd.runtime.residency import Residency
from jaxspd.target import Target


class Components:
    """The text encoders and the autoencoder of `family`, run in `dtype` on the device of `target`. Several
    threads may use them, one after the other: two text encoders do not lie in memory together.

    `offload` is whether text encoders' weights are read anew for every use; None leaves it to the residency.
    """

    def __init__(
        self,
        family,
        dtype,
        offload: bool | None = None,
        target: Target | None = None,
        loras: Sequence[tuple[LoraFile, float]] = (),
    ):
        self.family, self.dtype, self._loras = family, dtype, loras
        self.residency = Residency(offload, target)
        self._lock = RLock()

    @cached_property
    def texts(self) -> tuple[TextEncoder, ...]:
        """The text encoders, in the order in which the family names them."""
        folder, asked = self.family.folder, self.family.texts
        merges = [partial(self._merged, number, len(asked)) for number in range(1, len(asked) + 1)]
        return tuple(
            TextEncoder(folder, text, self.dtype, self.residency, merge)
            for text, merge in zip(asked, merges, strict=True)
        )

    def _merged(self, number: int, count: int, tensors: Any) -> Any:
        """The `tensors` of the `number`-th of `count` text encoders, with LoRAs in them."""
        if not any(file.text_modules for file, _ in self._loras):
            return tensors
        return Merged(tensors, changes(self._loras, text_model(number, count, tensors)))

    def set_loras(self, loras: Sequence[tuple[LoraFile, float]]) -> None:
        """Merges `loras` instead of those that were; UsageError if one does not fit."""
        with self._lock:
            before, self._loras = self._loras, loras
            if not any(file.text_modules for file, _ in (*before, *loras)):
                return
            opened = vars(self).pop("texts", ())
            try:
                _ = self.texts
            except UsageError:
                self._loras = before
                vars(self)["texts"] = opened
                raise
            for text in opened:
                self.residency.forget(text.weights)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        return self.family.open_autoencoder(self.dtype, self.residency)

    @cached_property
    def _preview(self) -> Preview:
        return fit(self.encode, self.decode, self.family.pixels_per_latent)

    def check(self) -> None:
        """UsageError if a file of theirs is missing or damaged, or what they hold does not fit together:
        better now than when the latents are ready to be decoded. Reads headers and configurations only.
        """
        with self._lock:
            _ = self.texts, self.autoencoder

    def encode_text(self, texts: Sequence[str], family=None) -> dict[str, np.ndarray]:
        """What the denoiser reads of `texts`, as `family.encode` says; another `family` may read fewer
        tokens.
        """
        with self._lock:
            return (family or self.family).encode(texts, self.texts)

    def prepare(self, shape: tuple[int, ...]) -> None:
        """Compiles what decodes clean latents of `shape`, so that `decode` need not wait for it."""
        with self._lock:
            self.autoencoder.prepare(shape)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pixels `[B, F, H, W, 3]`, uint8, of clean latents `[B, C, (t,) h, w]`."""
        with self._lock:
            return self.autoencoder.decode(latents)

    def preview(self, latents: np.ndarray) -> np.ndarray:
        """Pixels `[t, h, w, 3]`, uint8, one for each of clean latents `[1, C, (t,) h, w]`: a quick look, by a
        linear map that is fitted to the decoder at the first use.
        """
        if "_preview" not in vars(self):
            with self._lock:
                _ = self._preview
        return self._preview(latents)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Clean latents, float32, of pixels `[B, F, H, W, 3]`, uint8: `decode`'s reverse."""
        with self._lock:
            return self.autoencoder.encode(pixels, pictures=self.family.default_fps is None)
