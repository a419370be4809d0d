"""Weights stored in 8 bits, made floats tensor by tensor, and what other quantised forms are called.

A weight in fp8 stands alone, or has a scale beside it that it is multiplied by: one number, one for each
row, or one for each block of a row. ComfyUI writes `scale_weight` (older) or `weight_scale` (newer, with the
form's name in a tensor `comfy_quant` or in the file's metadata), lightx2v `weight_scale` for int8 as well.
What scales a layer's input, and what only marks the form, is of no use here.
"""

import json
import re
from contextlib import suppress

import ml_dtypes
import numpy as np

from .checkpoint import Checkpoint
from .copying import empty, every, look_up
from .errors import UsageError

BYTES = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "I8": np.int8}
# After a layer's name: what a weight is multiplied by, and what nothing reads.
SCALES = ("scale_weight", "weight_scale")
UNREAD = ("scale_input", "input_scale", "comfy_quant", "scaled_fp8")
# The forms that can be read, by ComfyUI's names.
FORMS = {"float8_e4m3fn", "float8_e5m2"}
MARK, METADATA = "comfy_quant", "_quantization_metadata"
# The last parts of names that only another form's tensors have, and what it is called.
FOREIGN = {
    "absmax": "bitsandbytes (nf4 or fp4)",
    "quant_map": "bitsandbytes (nf4 or fp4)",
    "SCB": "bitsandbytes (int8)",
    "qweight": "nunchaku (SVDQuant), GPTQ or AWQ",
    "wscales": "nunchaku (SVDQuant)",
    "smooth_factor": "nunchaku (SVDQuant)",
    "weight_scale_2": "nvfp4",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "fp8 in blocks",
}
STATE = ".quant_state."
# And those whose types only such a form has.
FOREIGN_TYPES = {"F4": "fp4", "F8_E8M0": "mxfp8", "F6_E2M3": "fp6", "F6_E3M2": "fp6"}


class Dequantised:
    """A checkpoint without its quantisation: weights in 8 bits are floats, their companions are gone.

    `foreign` is what the file's quantisation is called where it is not read here.
    """

    def __init__(self, checkpoint, beside: re.Pattern | None = None):
        """Tensors whose names begin with `beside` are another component's, and are not looked at."""
        self.folder, self.config, self.metadata = checkpoint.folder, checkpoint.config, checkpoint.metadata
        self._checkpoint = checkpoint
        names = checkpoint.keys()
        stored = {key for key in names if beside is None or not beside.match(key)}
        self._scales: dict[str, str] = {}
        companions = set()
        for key in stored:
            layer, _, name = key.rpartition(".")
            if name in SCALES:
                self._scales[f"{layer}.weight" if layer else "weight"] = key
            if name in SCALES or name in UNREAD or name in FOREIGN or STATE in key:
                companions.add(key)
        self._keys = stored - companions
        self.foreign = _foreign(checkpoint, stored, beside)

    def without(self, beside: re.Pattern) -> "Dequantised":
        """The same without tensors whose names begin with `beside`."""
        return Dequantised(self._checkpoint, beside)

    def keys(self) -> set[str]:
        return set(self._keys)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._checkpoint.shape(key)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {key: self.shape(key) for key in self._keys}

    def dtype(self, key: str) -> str:
        """Of what `read` gives, which loses nothing of the stored values."""
        if key in self._scales:
            return "F32"
        kind = self._checkpoint.dtype(key)
        return "BF16" if kind in ("F8_E4M3", "F8_E5M2") else kind

    def stored_dtype(self, key: str) -> str:
        """As the file names it."""
        named = getattr(self._checkpoint, "stored_dtype", self._checkpoint.dtype)
        return named(key)

    def check_floats(self) -> None:
        """UsageError if the weights are in a form that is not read here."""
        if self.foreign:
            raise UsageError(
                f"{self.folder} is quantised as {self.foreign}, which jaxspd does not read; give the same "
                "model in bfloat16, float16, fp8 or GGUF"
            )
        if isinstance(self._checkpoint, Checkpoint):
            kinds = {self.dtype(key) for key in self._keys}
            if odd := sorted(kinds - {"F32", "F16", "BF16"}):
                raise UsageError(
                    f"{self.folder} stores weights as {', '.join(odd)}; give the same model in bfloat16, "
                    "float16, float32, fp8 or GGUF"
                )
        else:
            self._checkpoint.check_floats()
        for key, scale in self._scales.items():
            if key in self._keys:
                _spread(self._checkpoint.shape(scale), self.shape(key), scale)

    def read(self, key: str, rows: slice | None = None) -> np.ndarray:
        """The tensor, or some `rows` of it: weights with a scale in float32, fp8 without one in bfloat16."""
        values = self._checkpoint.read(key, rows)
        kind = self._checkpoint.dtype(key)
        if key not in self._scales:
            return floats(values, ml_dtypes.bfloat16) if kind in BYTES else values
        scale = self._checkpoint.read(self._scales[key]).astype(np.float32)
        shape = _spread(scale.shape, self.shape(key), self._scales[key])
        scale = scale.reshape(shape)
        if len(shape) and shape[0] > 1 and rows is not None:
            scale = scale[rows]
        wide = floats(values, np.float32) if kind in BYTES else values.astype(np.float32)
        if len(shape) == 2 and shape[1] > 1:  # blocks
            parts = wide.reshape(len(wide), shape[1], -1)
            np.multiply(parts, scale[..., None], out=parts)
        else:
            np.multiply(wide, scale, out=wide)
        return wide


def _spread(scale: tuple[int, ...], weight: tuple[int, ...], name: str) -> tuple[int, ...]:
    """The shape in which a scale meets its weight: (), (rows, 1, …) or (rows, blocks); UsageError where it is
    none of them.
    """
    size = int(np.prod(scale, dtype=object)) if scale else 1
    rows = weight[0] if weight else 1
    if size == 1:
        return ()
    if size == rows == scale[0]:
        return (rows, *(1 for _ in weight[1:]))
    blocks = size // max(rows, 1)
    if len(weight) == 2 and scale[0] == rows and size == scale[0] * scale[1] and weight[1] % blocks == 0:
        return (rows, blocks)
    raise UsageError(f"{name} {list(scale)} does not fit its weight {list(weight)}; download the file again")


def floats(values: np.ndarray, dtype) -> np.ndarray:
    """Values of 8 bits in another `dtype`, looked up."""
    made = empty(values.shape, dtype)
    bits = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    look_up(made.reshape(-1), bits, every(values.dtype, made.dtype))
    return made


def _foreign(checkpoint, keys: set[str], beside: re.Pattern | None) -> str | None:
    """What a quantised form is called that is not read here; None if there is none."""
    if any(STATE in key for key in keys):
        return "bitsandbytes (nf4 or fp4)"
    for name, form in FOREIGN.items():
        if any(key == name or key.endswith(f".{name}") for key in keys):
            return form
    for kind in sorted({checkpoint.dtype(key) for key in keys}):
        if kind in FOREIGN_TYPES:
            return FOREIGN_TYPES[kind]
    for told in _told(checkpoint, keys, beside):
        form = told.get("format")
        if told.get("convrot"):
            return "convrot (rotated weights)"
        if form not in FORMS:
            return str(form)[:40]
    return None


def _told(checkpoint, keys: set[str], beside: re.Pattern | None):
    """What ComfyUI says of each layer's form, in the file's metadata and in tensors of JSON."""
    with suppress(ValueError, AttributeError, TypeError, RecursionError):
        layers = json.loads(checkpoint.metadata.get(METADATA, "{}")).get("layers", {})
        for layer, told in layers.items():
            if isinstance(told, dict) and not (beside and beside.match(layer)):
                yield told
    for key in sorted(keys):
        if key == MARK or key.endswith(f".{MARK}"):
            told = None
            if checkpoint.dtype(key) == "U8" and np.prod(checkpoint.shape(key), dtype=object) < 10_000:
                with suppress(ValueError, RecursionError):
                    told = json.loads(checkpoint.read(key).tobytes())
            yield told if isinstance(told, dict) else {"format": "a form that cannot be read"}
