"""Configuration files of a checkpoint's parts: what is read of them has the type and range that it needs."""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from jaxspd.convert.checkpoint import read_json
from jaxspd.errors import UsageError

# Far above any checkpoint's, and low enough that nothing built of them is endless.
LARGEST, MOST_LAYERS, LARGEST_SIDE = 2**20, 1000, 8192


@dataclass(frozen=True)
class SchedulerConfig:
    """What noise levels are made of in `scheduler_config.json`, with the official classes' defaults."""

    _class_name: str = ""
    num_train_timesteps: int = 1000
    use_dynamic_shifting: bool = False
    shift: float = 1.0
    flow_shift: float = 1.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None
    time_shift_type: str = "exponential"


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """What is read of `vae/config.json` for FLUX.1's kind of VAE, with the official class's defaults."""

    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    sample_size: int = 1024  # of the published pictures; the class's own default is of no model


@dataclass(frozen=True)
class Flux2AutoencoderConfig:
    """The same for FLUX.2's."""

    latent_channels: int = 32
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    batch_norm_eps: float = 1e-4
    patch_size: tuple[int, ...] = (2, 2)


@dataclass(frozen=True)
class VideoAutoencoderConfig:
    """The same for the VAEs of Wan and Qwen-Image. Statistics that are not given are the class's own."""

    z_dim: int = 16
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = (0.0,) * 16
    latents_std: tuple[float, ...] = (1.0,) * 16
    scale_factor_spatial: int | None = 8
    scale_factor_temporal: int | None = 4


def read_fields(path: Path, config_class: type) -> Any:
    """`config_class`, a dataclass, with those of its fields that the JSON file `path` holds.

    UsageError for a value of another type than the field's; whole numbers are 1 to `LARGEST`, numbers of
    layers 0 to `MOST_LAYERS`, other numbers finite, lists not empty.
    """
    kinds, values = get_type_hints(config_class), {}
    for name, value in read_json(path).items():
        if name in {field.name for field in fields(config_class)}:
            values[name] = tuple(value) if isinstance(value, list) else value
            if not _fits(values[name], kinds[name], MOST_LAYERS if "layers" in name else LARGEST):
                raise wrong(path, name, value, _described(kinds[name]))
    return config_class(**values)


def read_scheduler(folder: Path) -> dict:
    """`scheduler/scheduler_config.json` of a pipeline; UsageError if a schedule cannot be made of it."""
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_fields(path, SchedulerConfig)
    for name in ("shift", "flow_shift"):
        if getattr(config, name) <= 0:
            raise wrong(path, name, getattr(config, name), "a number above 0")
    if config.num_train_timesteps < 2:
        raise wrong(path, "num_train_timesteps", config.num_train_timesteps, "2 or more")
    if config.base_image_seq_len >= config.max_image_seq_len:
        raise wrong(path, "max_image_seq_len", config.max_image_seq_len, "more than base_image_seq_len")
    if not 0 <= (config.shift_terminal or 0) < 1:
        raise wrong(path, "shift_terminal", config.shift_terminal, "0 or more and below 1")
    return read_json(path)


def read_autoencoder_kl(folder: Path) -> dict:
    """`vae/config.json` of FLUX.1's kind of VAE, with what it leaves out."""
    path = folder / "vae" / "config.json"
    config = read_fields(path, AutoencoderKLConfig)
    if config.scaling_factor <= 0:
        raise wrong(path, "scaling_factor", config.scaling_factor, "a number above 0")
    if config.sample_size > LARGEST_SIDE:
        raise wrong(path, "sample_size", config.sample_size, f"at most {LARGEST_SIDE}")
    return {**vars(config), **read_json(path)}


def read_flux2_autoencoder(folder: Path) -> dict:
    """`vae/config.json` of FLUX.2's VAE, with what it leaves out."""
    path = folder / "vae" / "config.json"
    config = read_fields(path, Flux2AutoencoderConfig)
    if config.batch_norm_eps <= 0:
        raise wrong(path, "batch_norm_eps", config.batch_norm_eps, "a number above 0")
    if config.patch_size != (2, 2):
        raise wrong(path, "patch_size", config.patch_size, "[2, 2]")
    return {**vars(config), **read_json(path)}


def read_video_autoencoder(folder: Path) -> dict:
    """`vae/config.json` of Wan's or Qwen-Image's VAE, with what it leaves out of the sizes."""
    path = folder / "vae" / "config.json"
    config, given = read_fields(path, VideoAutoencoderConfig), read_json(path)
    for name in ("latents_mean", "latents_std"):
        if len(getattr(config, name)) != config.z_dim:
            raise wrong(path, name, given.get(name), f"a list of z_dim, {config.z_dim}, numbers")
    if min(config.latents_std) <= 0:
        raise wrong(path, "latents_std", given["latents_std"], "a list of numbers above 0")
    sizes = {"z_dim": config.z_dim, "temperal_downsample": config.temperal_downsample}
    return {**sizes, **given}


def read_text_length(folder: Path, tokenizer: str, longest: int) -> int:
    """Tokens of text that the model reads: `longest`, or fewer where the tokenizer says so."""
    path = folder / tokenizer / "tokenizer_config.json"
    given = read_json(path).get("model_max_length")
    if given is None:
        return longest
    if isinstance(given, bool) or not isinstance(given, int | float) or not given >= 1:
        raise wrong(path, "model_max_length", given, "1 or more")
    return int(min(longest, given))


def check_rope(folder: Path, head: int, axes: tuple[int, ...], count: int) -> None:
    """UsageError unless a head's channels turn in pairs with `count` axes, `axes` of them each."""
    if len(axes) != count or sum(axes) != head or any(size % 2 for size in axes):
        raise UsageError(
            f"{folder / 'transformer' / 'config.json'}: heads of {head} channels cannot be turned by axes of "
            f"{list(axes)}, which must be {count} even numbers that add up to them; download the file again"
        )


def wrong(path: Path, name: str, value: Any, wanted: str) -> UsageError:
    text = json.dumps(value)
    text = text if len(text) <= 40 else f"{text[:40]}…"
    return UsageError(f"{path}: {name} must be {wanted}, not {text}; download the file again")


def _fits(value: Any, kind: Any, largest: int) -> bool:
    if NoneType in get_args(kind):
        return value is None or _fits(value, get_args(kind)[0], largest)
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        length = len(value) if isinstance(value, tuple) else 0
        kinds = kinds[:1] * length if kinds[1:] == (...,) else kinds
        return 0 < length == len(kinds) and all(map(_fits, value, kinds, [largest] * length))
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value) and abs(value) <= 1e30
    if kind is int:
        return type(value) is int and (0 if largest == MOST_LAYERS else 1) <= value <= largest
    return type(value) is kind


def _described(kind: Any) -> str:
    if NoneType in get_args(kind):
        return f"{_described(get_args(kind)[0])} or null"
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        length = "" if kinds[1:] == (...,) else f"{len(kinds)} "
        return f"a list of {length}values, each {_described(kinds[0])}"
    return {int: "a whole number in range", float: "a finite number", bool: "true or false", str: "text"}[
        kind
    ]
