"""The components of one pipeline other than the transformer. Each is opened when it is first needed."""

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
    """The text encoders and the autoencoder of `family`, run in `dtype`. Text encoders run on the
    first device of `target`, the autoencoder on all of them.

    Several threads may use them, one at a time, so that two text encoders are never in memory together. If
    `offload`, text encoders' weights are read anew for every use; None leaves this to the residency.
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
        """The text encoders, in the family's order."""
        folder, asked = self.family.folder, self.family.texts
        merges = [partial(self._merged, number, len(asked)) for number in range(1, len(asked) + 1)]
        return tuple(
            TextEncoder(folder, text, self.dtype, self.residency, merge)
            for text, merge in zip(asked, merges, strict=True)
        )

    def _merged(self, number: int, count: int, tensors: Any) -> Any:
        """The `tensors` of text encoder `number` of `count`, counted from 1, with LoRAs merged."""
        if not any(file.text_modules for file, _ in self._loras):
            return tensors
        return Merged(tensors, changes(self._loras, text_model(number, count, tensors)))

    def set_loras(self, loras: Sequence[tuple[LoraFile, float]]) -> None:
        """Merges `loras` in place of the earlier ones. Raises UsageError if one does not fit."""
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
        """Raises UsageError if a component's file is missing or damaged, or if the components do not fit each
        other. Reads only headers and configurations, before any time is spent on latents.
        """
        with self._lock:
            _ = self.texts, self.autoencoder

    def encode_text(self, texts: Sequence[str], family=None) -> dict[str, np.ndarray]:
        """The arrays that the denoiser reads for `texts`, as `family.encode` describes them. Another `family`
        may read fewer tokens.
        """
        with self._lock:
            return (family or self.family).encode(texts, self.texts)

    def prepare(self, shape: tuple[int, ...]) -> None:
        """Compiles the programs that decode clean latents of `shape`, so that `decode` need not wait for
        them.
        """
        with self._lock:
            self.autoencoder.prepare(shape)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pixels `[B, F, H, W, 3]`, uint8, of clean latents `[B, C, (t,) h, w]`."""
        with self._lock:
            return self.autoencoder.decode(latents)

    def preview(self, latents: np.ndarray) -> np.ndarray:
        """Pixels `[t, h, w, 3]`, uint8, one per latent, of clean latents `[1, C, (t,) h, w]`. They come from
        a linear map that is fitted to the decoder at the first use.
        """
        if "_preview" not in vars(self):
            with self._lock:
                _ = self._preview
        return self._preview(latents)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Clean latents, float32, of pixels `[B, F, H, W, 3]`, uint8: the reverse of `decode`."""
        with self._lock:
            return self.autoencoder.encode(pixels, pictures=self.family.default_fps is None)
