"""Reads weights of 8 bits as floats, one tensor at a time, and names the quantised forms that are not read.

An fp8 weight stands alone or has a scale, by which it is multiplied: one number, one per row, or one per
block of a row. ComfyUI calls the scale `scale_weight` in older files and `weight_scale` in newer ones, where
a tensor `comfy_quant` or the file's metadata names the form. lightx2v uses `weight_scale` for int8 too.
Scales of a layer's input, and tensors that only name the form, are not used here.
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
# Endings of names after a layer's name: scales of weights, and tensors that are not read.
SCALES = ("scale_weight", "weight_scale")
UNREAD = ("scale_input", "input_scale", "comfy_quant", "scaled_fp8")
# ComfyUI's names of the forms that can be read.
FORMS = {"float8_e4m3fn", "float8_e5m2"}
MARK, METADATA = "comfy_quant", "_quantization_metadata"
# Last parts of tensor names that occur only in other forms, and the names of these forms.
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
# Stored types that occur only in other forms, and the names of these forms.
FOREIGN_TYPES = {"F4": "fp4", "F8_E8M0": "mxfp8", "F6_E2M3": "fp6", "F6_E3M2": "fp6"}


class Dequantised:
    """A checkpoint without its quantisation: weights of 8 bits become floats, and their scales are hidden.

    `foreign` names the file's quantisation if it cannot be read here, else it is None.
    """

    def __init__(self, checkpoint, beside: re.Pattern | None = None):
        """Tensors whose names match `beside` belong to another component and are ignored."""
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
        """The same checkpoint without the tensors whose names match `beside`."""
        return Dequantised(self._checkpoint, beside)

    def keys(self) -> set[str]:
        return set(self._keys)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._checkpoint.shape(key)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {key: self.shape(key) for key in self._keys}

    def dtype(self, key: str) -> str:
        """The dtype of what `read` returns. It holds every stored value exactly."""
        if key in self._scales:
            return "F32"
        kind = self._checkpoint.dtype(key)
        return "BF16" if kind in ("F8_E4M3", "F8_E5M2") else kind

    def stored_dtype(self, key: str) -> str:
        """The dtype as the file names it."""
        named = getattr(self._checkpoint, "stored_dtype", self._checkpoint.dtype)
        return named(key)

    def check_floats(self) -> None:
        """Raises UsageError if the weights are in a form that cannot be read here."""
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
        """The tensor, or some `rows` of it. Weights with a scale become float32; fp8 without a scale becomes
        bfloat16.
        """
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
    """The shape in which a scale multiplies its weight: (), (rows, 1, …) or (rows, blocks). Raises UsageError
    if it fits none of them.
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
    """`values` of 8 bits converted to `dtype` through a table."""
    made = empty(values.shape, dtype)
    bits = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    look_up(made.reshape(-1), bits, every(values.dtype, made.dtype))
    return made


def _foreign(checkpoint, keys: set[str], beside: re.Pattern | None) -> str | None:
    """The name of a quantised form that cannot be read here; None if there is none."""
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
    """ComfyUI's descriptions of the layers' forms, from the file's metadata and from tensors that hold
    JSON.
    """
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
