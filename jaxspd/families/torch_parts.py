"""Text encoders and VAEs: PyTorch modules of transformers and diffusers, held while they work and, where a
residency keeps them, until they work again.
"""

import logging
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers

from jaxspd.convert.checkpoint import STEM, VARIANT, Checkpoint, file_names, weight_entry
from jaxspd.errors import UsageError, first_line
from jaxspd.families.residency import Residency, current

log = logging.getLogger("jaxspd")

# Their progress bars and advice are about loading; ours are about the picture.
for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()

OPTIONS = {
    "use_safetensors": True,
    "local_files_only": True,
    "output_loading_info": True,
    "ignore_mismatched_sizes": True,  # `check_report` refuses them, and says which
}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What files hold of the models that these classes are the text encoders of.
UNUSED = {
    "CLIPTextModel": ("vision_model.", "visual_projection.", "text_projection.", "logit_scale"),
    "T5EncoderModel": ("decoder.", "lm_head."),
    "UMT5EncoderModel": ("decoder.", "lm_head."),
    "Qwen3Model": ("lm_head.",),
}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def vae_dtype() -> torch.dtype:
    """What pictures are decoded in."""
    return torch.bfloat16 if device() == "cuda" else torch.float32


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turns what libraries raise for an unusable component folder into one line for the user."""
    try:
        yield
    except (UsageError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each library, and each file format below it, raises its own
        if not folder.is_dir():
            raise UsageError(f"{folder} is missing; the checkpoint folder is incomplete") from error
        line = first_line(error)
        raise UsageError(f"{folder} cannot be loaded ({line}); download it again") from error


def stem(module_class: type) -> str:
    """How the names of a class's weight files begin."""
    return STEM if issubclass(module_class, diffusers.ModelMixin) else "model"


def weights(module_class: type, folder: Path) -> Checkpoint:
    """The files that a class of diffusers or transformers reads of a folder."""
    return Checkpoint(folder, stem(module_class))


def variant(module_class: type, folder: Path) -> str | None:
    """What tells the names of a folder's weight files from the usual, where it has no others."""
    return VARIANT if f".{VARIANT}." in (weight_entry(file_names(folder), stem(module_class)) or "") else None


def check_report(module_class: type, folder: Path, report: dict) -> None:
    """UsageError if weights were missing, left over or misshapen, but for `UNUSED`."""
    unused = UNUSED.get(module_class.__name__, ())
    left = {
        key
        for key in report["unexpected_keys"]
        if not key.startswith(unused) and not key.endswith((".position_ids", ".inv_freq"))
    }
    misshapen = {str(key[0]) for key in report["mismatched_keys"]}
    for what, keys in (
        ("left over", left),
        ("missing", report["missing_keys"]),
        ("misshapen", misshapen),
    ):
        if keys:
            listed = ", ".join(sorted(keys)[:4]) + (", …" if len(keys) > 4 else "")
            raise UsageError(f"{folder} does not fit its config.json: {len(keys)} {what}: {listed}")


def abstract_module(module_class: type, folder: Path) -> torch.nn.Module:
    """A pretrained module without its weights; UsageError where `torch_module` could not open it."""
    with readable(folder):
        checkpoint = weights(module_class, folder)
        checkpoint.check_floats()
        tensors = {
            key: torch.empty(
                checkpoint.shape(key), dtype=DTYPES.get(checkpoint.dtype(key), torch.int64), device="meta"
            )
            for key in checkpoint.keys()  # noqa: SIM118
        }
        if issubclass(module_class, diffusers.ModelMixin):
            # In the dtype stored: diffusers would cast what it then throws away.
            dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
            module, report = module_class.from_pretrained(
                folder,
                device_map={"": "meta"},
                torch_dtype=dtype,
                variant=variant(module_class, folder),
                **OPTIONS,
            )
        else:
            # From files, transformers would read them.
            config = module_class.config_class.from_pretrained(folder, local_files_only=True)
            module, report = module_class.from_pretrained(
                None, config=config, state_dict=tensors, device_map={"": "meta"}, **OPTIONS
            )
        check_report(module_class, folder, report)
    return module.eval()


@contextmanager
def meta_limits(folder: Path) -> Iterator[None]:
    """As `readable`; but what fails because there are no weights says nothing about the folder."""
    try:
        with readable(folder):
            yield
    except UsageError as error:
        if not isinstance(error.__cause__, RuntimeError) or "meta" not in str(error.__cause__):
            raise


@contextmanager
def torch_module(module_class: type, folder: Path, dtype="auto") -> Iterator[torch.nn.Module]:
    """A pretrained module on the best device. It is released again at the end, unless the residency in
    force keeps it. Safetensors only, of half precision where there are no others.
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
        weights(module_class, folder).check_floats()
        options = {**OPTIONS, "variant": variant(module_class, folder)}
        module, report = module_class.from_pretrained(folder, torch_dtype=dtype, **options)
        check_report(module_class, folder, report)
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


def embedding(states: torch.Tensor, part: Path) -> np.ndarray:
    """What the text encoder of the folder `part` makes of prompts, as float32. UsageError unless all of it is
    finite.
    """
    values = states.float().cpu().numpy()
    if not np.isfinite(values).all():
        raise UsageError(
            f"{part} makes NaN or infinity of the prompt; its weights are damaged, download it again"
        )
    return values


def decode(vae: torch.nn.Module, latents: np.ndarray) -> np.ndarray:
    """Pixels `[B, …, 3]`, uint8, of latents `[B, C, …]`. One by one: at 1024² a picture's decoding takes
    several gigabytes. Where the GPU has not as much left, the CPU goes on, in float32. UsageError unless all
    of it is finite.
    """
    pixels = []
    for one in latents:
        try:
            pixels.append(decode_here(vae, one[None]))
        except torch.OutOfMemoryError:
            log.warning("decoding does not fit into the GPU's memory beside the rest; it runs on the CPU")
            vae = vae.to("cpu", torch.float32)
            torch.cuda.empty_cache()
            pixels.append(decode_here(vae, one[None]))
    return np.concatenate(pixels)


def decode_here(vae: torch.nn.Module, latents: np.ndarray) -> np.ndarray:
    """`decode` of a batch at once, where the VAE is."""
    decoded = vae.decode(torch.from_numpy(latents).to(vae.device, vae.dtype)).sample.float().cpu()
    if not decoded.isfinite().all():
        raise UsageError(
            "the VAE makes NaN or infinity of the latents; lower guidance_scale, or if others fail too, "
            "download the VAE's weights again"
        )
    scaled = (decoded / 2 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).movedim(1, -1).numpy()


def encode(vae: torch.nn.Module, pixels: np.ndarray) -> np.ndarray:
    """Latents `[B, C, …]`, float32, of pixels `[B, …, 3]`, uint8: the posterior's mode, so that equal pixels
    give equal latents. One by one, as in `decode`; UsageError where memory does not suffice for one, or the
    latents are not all finite.
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
        if not np.isfinite(latents[-1]).all():
            raise UsageError("the VAE makes NaN or infinity of a file; download the VAE's weights again")
    return np.concatenate(latents)


def decode_autoencoder_kl(folder: Path, latents: np.ndarray) -> np.ndarray:
    """Pixels `[B, H, W, 3]`, uint8, of normalised latents `[B, C, h, w]`, by FLUX.1's kind of VAE."""
    with torch_module(diffusers.AutoencoderKL, folder, vae_dtype()) as vae:
        return decode(vae, latents / vae.config.scaling_factor + (vae.config.shift_factor or 0))


@contextmanager
def autoencoder_kl_encoder(folder: Path) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """What undoes `decode_autoencoder_kl`, from pixels `[B, 1, H, W, 3]`; the VAE stays open meanwhile."""
    # In float32, here and in every encoder: what is encoded is measured.
    with torch_module(diffusers.AutoencoderKL, folder, torch.float32) as vae:
        scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0
        yield lambda pixels: (encode(vae, pixels[:, 0]) - shift) * scale


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


def open_tokenizer(folder: Path, tokenizer_class: type = transformers.AutoTokenizer, chat: bool = False):
    """The tokenizer of a component folder, of which no remote code is run. UsageError if all texts are alike
    to it, as they are without a vocabulary, or if it lacks the template of a `chat`, which may be a file of
    its own.
    """

    def load():
        with readable(folder):
            tokenizer = tokenizer_class.from_pretrained(folder, local_files_only=True)
            if chat and tokenizer.chat_template is None:
                raise UsageError(f"{folder} lacks a chat template (chat_template.jinja); download it again")
            told = {tuple(tokenizer(c, add_special_tokens=False).input_ids) for c in string.ascii_lowercase}
            # As it will be used: a wrong entry of its configuration shows here, not in the midst of a prompt.
            tokenize(tokenizer, ["a"], 8)
        if len(told) == 1:
            raise UsageError(f"{folder} tells no letters apart; its vocabulary is damaged, download it again")
        return tokenizer

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
