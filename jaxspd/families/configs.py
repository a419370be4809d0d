"""Reading and checking the scheduler's, the tokenizer's and the transformer's configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxspd.configs import checked_fields, read_fields, wrong
from jaxspd.convert.checkpoint import read_json
from jaxspd.errors import UsageError


@dataclass(frozen=True)
class SchedulerConfig:
    """The fields of `scheduler_config.json` for noise levels, with the official classes' defaults."""

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


def read_transformer_config(
    folder: Path, config_class: type, given: Mapping[str, Any] | None = None, part: str = "transformer"
) -> Any:
    """A `config_class` with the fields that the config.json of the pipeline's `part` holds.

    `given` takes the place of that file. Raises UsageError for a value of the wrong type, and for a float
    that is not positive.
    """
    path = folder / part / "config.json"
    config = config_class(**checked_fields(path, read_json(path) if given is None else given, config_class))
    for name, value in vars(config).items():
        if isinstance(value, float) and value <= 0:
            raise wrong(path, name, value, "a number above 0")
    return config


def read_scheduler(folder: Path) -> dict:
    """A pipeline's `scheduler/scheduler_config.json`. Raises UsageError if it cannot give a schedule."""
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


def read_text_length(folder: Path, tokenizer: str, longest: int) -> int:
    """How many text tokens the model reads: `longest`, or fewer if the tokenizer's configuration says so.

    Raises UsageError unless that says a number of 1 or more.
    """
    path = folder / tokenizer / "tokenizer_config.json"
    given = read_json(path).get("model_max_length")
    if given is None:
        return longest
    if isinstance(given, bool) or not isinstance(given, int | float) or not given >= 1:
        raise wrong(path, "model_max_length", given, "1 or more")
    return int(min(longest, given))


def check_rope(folder: Path, head: int, axes: tuple[int, ...], count: int) -> None:
    """Raises UsageError unless `axes`, the channels that each axis rotates, fit a head's `head` channels.

    They must be `count` even numbers that add up to `head`.
    """
    if len(axes) != count or sum(axes) != head or any(size % 2 for size in axes):
        raise UsageError(
            f"{folder / 'transformer' / 'config.json'}: heads of {head} channels cannot be rotated by axes "
            f"of {list(axes)}; these must be {count} even numbers with sum {head}; download the file again"
        )
