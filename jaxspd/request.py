"""What a user can ask for. Does not import jax.

One dataclass defines the command's flags, the API's keywords and the configuration file's keys.
"""

import contextlib
import difflib
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from jaxspd.errors import UsageError
from jaxspd.files import is_text

METADATA_KEY = "jaxspd"
# Parameters that are 1 or more.
COUNTS = (
    "num_inference_steps",
    "num_outputs_per_prompt",
    "height",
    "width",
    "num_frames",
    "fps",
    "max_sequence_length",
)
# Parameters that name a file or a folder, as text or as a path object.
PATHS = ("output_path", "output_file_name", "spectrum")

# Limits that no machine or no file reaches. A larger value is taken for a slip, and refused before its plan
# fills the memory.
MOST = {
    "num_inference_steps": 1_000_000,
    "num_outputs_per_prompt": 10_000,
    "height": 16_384,
    "width": 16_384,
    "num_frames": 1_000_000,
    "fps": 1_000,
    "progressive_levels": 16,
}
# Seeds in other libraries have 64 bits.
MOST_SEED = 2**64 - 1


def option(default: Any, help: str, kind: type = str, many: bool = False) -> Any:
    """A field of type `kind`, or a list of these if `many`. None leaves the choice to the checkpoint."""
    return field(default=default, metadata={"help": help, "kind": kind, "many": many})


@dataclass(frozen=True)
class SamplingParams:
    """One request. Names and defaults are those of `sglang generate`. None means the checkpoint's default.

    Raises UsageError for a value of the wrong type or out of range.
    """

    prompt: str | list[str] | None = option(None, "what to show")
    prompt_suffix: str | None = option(
        None, "words put after each prompt (default: the model card's, where it has some)"
    )
    negative_prompt: str | None = option(None, "what to avoid, for models that are guided this way")
    speed: str | None = option(
        None, "exact (as published), high, fast or fastest: sets steps, solver and growth that are not given"
    )
    num_inference_steps: int | None = option(None, "denoising steps", int)
    guidance_scale: float | None = option(None, "how closely to follow the prompt", float)
    guidance_scale_2: float | None = option(
        None, "the same for Wan 2.2's second transformer (default: as of the first)", float
    )
    height: int | None = option(None, "height in pixels", int)
    width: int | None = option(None, "width in pixels", int)
    num_frames: int | None = option(None, "frames of a video, 4k + 1; 1 makes a picture", int)
    fps: int | None = option(None, "frames a second of the video written", int)
    scheduler: str | None = option(None, "solver: unipc or euler")
    forecast: float | None = option(
        None,
        "forecast the model at most steps; intervals between its evaluations grow by so much each: 0.75 "
        "evaluates 14 of 50 steps, 3 evaluates 10",
        float,
    )
    max_sequence_length: int | None = option(
        None, "tokens of text that the model reads; fewer are faster, but a longer prompt is cut", int
    )
    flow_shift: float | None = option(None, "shift of the noise levels at every size; more is noisier", float)
    noise_levels: str | None = option(
        None,
        "Z-Image's noise levels: its authors' (official, the default) or its scheduler's own (scheduler)",
    )
    seed: int = option(42, "seed; the n-th output of a prompt takes seed + n", int)
    num_outputs_per_prompt: int = option(1, "pictures or videos for each prompt", int)
    output_path: str = option("outputs", "folder for pictures and videos")
    output_format: str | None = option(
        None, "png for pictures; mp4 (with a poster), gif or frames (a folder) for videos"
    )
    output_file_name: str | None = option(None, "file name; default: from prompt, seed and settings")
    progressive_mode: str | None = option(
        None, "fullres (the default), dct (grow the resolution) or dct_rewind (and align the noise level)"
    )
    progressive_levels: int | None = option(
        None, "how many times the first stage's grid is halved (default: 1)", int
    )
    progressive_scales: list[str] | None = option(
        None,
        "the stages' scales instead: 0.5 1, or 1/3 2/3 1; or heights in pixels, 480 720",
        many=True,
    )
    progressive_delta: float | None = option(
        None, "error allowed at a change of resolution, 0 to 1; more is faster (default: 0.01)", float
    )
    progressive_sigmas: list[float] | None = option(
        None, "noise levels at which the resolution changes, instead of delta", float, many=True
    )
    progressive_transform: str = option("dct", "basis in which the grid grows: dct, fft or dwt (Haar)")
    progressive_noise: str = option(
        "shared",
        "shared: all stages see one noise, so a seed is one picture at every delta; or fresh, as published",
    )
    progressive_history: str | None = option(
        None,
        "forget (the default): a multistep solver begins anew where the grid grows; or carry: it goes on",
    )
    progressive_respace: bool = option(
        False, "after a rewind, spread the steps left evenly, instead of one long step", bool
    )
    progressive_shift: str = option(
        "full", "dynamic shift of the noise levels: of the full grid, or of each stage's own (stage)"
    )
    progressive_grid: str | None = option(
        None, "grid that grows: latent, or patchified (FLUX.2's default: 2×2 latents as channels)"
    )
    spectrum: str | dict | None = option(
        None, "file that jaxspd calibrate wrote: the power spectrum by which the resolution changes"
    )

    def __post_init__(self):
        for item in fields(self):
            object.__setattr__(self, item.name, _checked(item, getattr(self, item.name)))
        for prompt in self.prompts:
            if not prompt.strip():
                raise UsageError("the prompt is empty; say what to show")
        for text in (*self.prompts, self.negative_prompt or ""):
            if any(
                "\ud800" <= letter <= "\udfff" for letter in text
            ):  # Python keeps bytes that are not text in this way
                raise UsageError(
                    f"the prompt {text!r} is not in UTF-8; write it anew, or set LC_ALL to C.UTF-8"
                )
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be 1 or more, not {value}")
        for name, most in MOST.items():
            if (getattr(self, name) or 0) > most:
                raise UsageError(f"{name} must be {most} or less, not {_short(getattr(self, name))}")
        if self.seed < 0:
            raise UsageError(f"seed must be 0 or more, not {_short(self.seed)}")
        if self.seed + self.num_outputs_per_prompt - 1 > MOST_SEED:
            raise UsageError(
                f"seed, with 1 added for each further output, must be {MOST_SEED} or less, not "
                f"{_short(self.seed)}"
            )

    @property
    def prompts(self) -> list[str]:
        """The prompts in a list: none, one or several."""
        if self.prompt is None:
            return []
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "SamplingParams":
        """Checked parameters. Raises UsageError for an unknown key, and names the nearest known one."""
        check_keys(values, [item.name for item in fields(cls)])
        return cls(**values)

    @classmethod
    def of(cls, request: "SamplingParams | Mapping[str, Any]") -> "SamplingParams":
        """`request` itself, or parameters from a mapping of fields. Raises UsageError for anything else."""
        if isinstance(request, cls):
            return request
        if not isinstance(request, Mapping):
            raise UsageError(f"a request must be SamplingParams or a mapping of its fields, not {request!r}")
        return cls.from_mapping(request)


class Request(SamplingParams):
    """What will run: parameters in which `resolving.resolve` has made every choice.

    Only parameters that the checkpoint does not use are None.
    """

    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    num_frames: int
    scheduler: str
    progressive_mode: str
    progressive_history: str
    progressive_grid: str
    spectrum: dict | None


def check_keys(values: Mapping[str, Any], known: list[str]) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            advice = f"did you mean {near[0]!r}?" if near else "see jaxspd generate --help"
            raise UsageError(f"unknown parameter {key!r}; {advice}")


def _checked(item, value: Any) -> Any:
    """`value` in the type of the field `item`. Raises UsageError if it has another type."""
    kind, many = item.metadata["kind"], item.metadata["many"]
    if value is None:
        if item.default is not None:
            raise UsageError(f"{item.name} needs a value")
        return None
    if item.name in PATHS and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if (many or item.name == "prompt") and isinstance(value, list | tuple):
        return [_one(item.name, kind, one) for one in value]
    if item.name == "spectrum" and isinstance(value, Mapping):
        return dict(value)
    if many:  # a configuration file may give one value, or several in one text
        value = value.split() if isinstance(value, str) else [value]
        return [_one(item.name, kind, one) for one in value]
    return _one(item.name, kind, value)


def _one(name: str, kind: type, value: Any) -> Any:
    """A single `value` in the type `kind`."""
    if name == "progressive_scales" and isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value}"
    if name == "progressive_sigmas" and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    wrong = UsageError(f"{name} must be {KIND_NAMES[kind]}, not {reprlib.repr(value)}")
    if (kind is bool) != isinstance(value, bool) or (kind is str) != isinstance(value, str):
        raise wrong
    try:
        converted = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
    if converted != value:
        raise wrong
    if kind is str and not is_text(value):
        raise UsageError(f"{name} holds bytes or escapes that are no text; give it in UTF-8")
    return converted


def _short(number: int) -> str:
    """`number` for a message. Python refuses to write more than 4300 digits, and nobody would read them."""
    return f"{number}" if abs(number) < 10**40 else "a number of more than 40 digits"


KIND_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
