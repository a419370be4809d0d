"""Text encoders and VAEs: PyTorch modules of transformers and diffusers, held while they work and, where a
residency keeps them, until they work again.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers

from jaxspd.errors import UsageError
from jaxspd.families.residency import Residency, current

log = logging.getLogger("jaxspd")

# Their progress bars and advice are about loading; ours are about the picture.
for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def vae_dtype() -> torch.dtype:
    """What pictures are decoded in."""
    return torch.bfloat16 if device() == "cuda" else torch.float32


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turns what libraries raise for an unusable component folder into one line for the user."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is missing; the checkpoint folder is incomplete")
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # each library, and each file format below it, raises its own
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{folder} cannot be loaded ({line}); download it again") from error


@contextmanager
def torch_module(module_class: type, folder: Path, dtype="auto") -> Iterator[torch.nn.Module]:
    """A pretrained module on the best device. It is released again at the end, unless the residency in
    force keeps it. Safetensors only.
    """
    residency, key = current(), (module_class, folder, str(dtype))
    module = residency.take(key) if residency else None
    if module is None:
        module = _load(module_class, folder, dtype)
    kept = False
    try:
        module = _to_device(module, folder, residency)
        with torch.inference_mode():
            yield module
        kept = residency is not None and residency.keep(key, module)
    finally:
        if not kept:
            module.to("meta")  # drops the weights, whoever still holds the module
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _load(module_class: type, folder: Path, dtype) -> torch.nn.Module:
    with readable(folder):
        module, report = module_class.from_pretrained(
            folder,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        if report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"])[:4])
            raise UsageError(f"{folder} lacks weights ({missing}); download it again")
    return module.eval()


def _to_device(module: torch.nn.Module, folder: Path, residency: Residency | None) -> torch.nn.Module:
    """`module` on the GPU, if need be in the place of those kept there; on the CPU if it does not fit."""
    try:
        return module.to(device())
    except torch.OutOfMemoryError:
        module.to("cpu")  # some of it may have arrived
        torch.cuda.empty_cache()
    if residency and "device" in residency.places().values():
        residency.leave_device()
        return _to_device(module, folder, residency)
    log.warning("%s does not fit into the GPU's memory beside the rest; it runs on the CPU", folder.name)
    return module


def decode(vae: torch.nn.Module, latents: np.ndarray) -> np.ndarray:
    """Pixels `[B, …, 3]`, uint8, of latents `[B, C, …]`. One by one: at 1024² a picture's decoding takes
    several gigabytes.
    """
    pixels = []
    for one in latents:
        decoded = vae.decode(torch.from_numpy(one[None]).to(vae.device, vae.dtype)).sample
        scaled = (decoded.float().cpu() / 2 + 0.5).clamp(0, 1) * 255
        pixels.append(scaled.round().to(torch.uint8).movedim(1, -1).numpy())
    return np.concatenate(pixels)


def encode(vae: torch.nn.Module, pixels: np.ndarray) -> np.ndarray:
    """Latents `[B, C, …]`, float32, of pixels `[B, …, 3]`, uint8: the posterior's mode, so that equal pixels
    give equal latents. One by one, as in `decode`; UsageError where memory does not suffice for one.
    """
    latents = []
    for one in pixels:
        scaled = torch.tensor(one[None]).to(vae.device, vae.dtype).movedim(-1, 1) / 127.5 - 1
        try:
            latents.append(vae.encode(scaled).latent_dist.mode().float().cpu().numpy())
        except torch.OutOfMemoryError:
            *_, height, width, _ = pixels.shape
            raise UsageError(
                f"encoding {width}×{height} pixels takes more memory than the GPU has free; "
                f"use a smaller height and width"
            ) from None
    return np.concatenate(latents)


def decode_autoencoder_kl(folder: Path, latents: np.ndarray) -> np.ndarray:
    """Pixels `[B, H, W, 3]`, uint8, of normalised latents `[B, C, h, w]`, by FLUX.1's kind of VAE."""
    with torch_module(diffusers.AutoencoderKL, folder, vae_dtype()) as vae:
        return decode(vae, latents / vae.config.scaling_factor + vae.config.shift_factor)


@contextmanager
def autoencoder_kl_encoder(folder: Path) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """What undoes `decode_autoencoder_kl`, from pixels `[B, 1, H, W, 3]`; the VAE stays open meanwhile."""
    # In float32, here and in every encoder: what is encoded is measured.
    with torch_module(diffusers.AutoencoderKL, folder, torch.float32) as vae:
        yield lambda pixels: (encode(vae, pixels[:, 0]) - vae.config.shift_factor) * vae.config.scaling_factor


def channel_statistics(vae: torch.nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation `[C, 1, 1, 1]` of a video VAE's latents `[B, C, T, h, w]`, channel by channel."""
    mean, std = (
        np.asarray(values, np.float32)[:, None, None, None]
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


@contextmanager
def video_encoder(vae_class: type, folder: Path) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """A function from pixels `[B, F, H, W, 3]`, uint8, to normalised latents `[B, C, T, h, w]`, float32; the
    VAE stays open meanwhile.
    """
    with torch_module(vae_class, folder, torch.float32) as vae:
        mean, std = channel_statistics(vae)
        yield lambda pixels: (encode(vae, pixels) - mean) / std


def open_tokenizer(folder: Path, tokenizer_class: type = transformers.AutoTokenizer):
    """The tokenizer of a component folder, of which no remote code is run."""

    def load():
        with readable(folder):
            return tokenizer_class.from_pretrained(folder, local_files_only=True)

    residency = current()
    return residency.once((tokenizer_class, folder), load) if residency else load()


def tokenize(tokenizer, texts: Sequence[str], length: int, before: int = 0, **options):
    """Token ids and attention mask `[B, before + length]` of `texts`, padded or cut; a warning tells how much
    is cut. `before` is how many tokens each has that are not the prompt's, `options` are the tokenizer's.
    """
    for text in texts:
        if (count := len(tokenizer(text, **options).input_ids) - before) > length:
            log.warning("the model reads %d of the prompt's %d tokens", length, count)
    return tokenizer(
        list(texts),
        padding="max_length",
        max_length=before + length,
        truncation=True,
        return_tensors="pt",
        **options,
    )
