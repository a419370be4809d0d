"""Checkpoints in safetensors, a folder or a file, single or sharded: read and written tensor by tensor."""

import json
import mmap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # gives NumPy bfloat16, in which most official weights are stored
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .errors import UsageError
from .table import Rule, official_keys

STEM = "diffusion_pytorch_model"
# Some checkpoints hold weights of half the size as well, and a few nothing else.
VARIANT = "fp16"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
# Stored types that hold weights, by their names in safetensors.
FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# And those of quantised weights, of counters and of indices.
DTYPES = FLOATS | {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I8": np.int8,
    "U8": np.uint8,
    "I32": np.int32,
    "I64": np.int64,
}
# Counters and indices, which some classes store beside their weights.
INTEGERS = ("position_ids", "num_batches_tracked")


class Stored(NamedTuple):
    """A tensor of a safetensors file; `dtype` as safetensors names it: F32, BF16, …; `start` in bytes from
    where the file begins.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int


class Checkpoint:
    """The tensors of one component: of a folder, a file, or the files that an index lists. Headers are read
    at once, tensors when asked.
    """

    # What says how large its tensors must be, for messages.
    config = "its config.json"

    def __init__(self, folder: Path, stem: str = STEM):
        """`stem` is the name of a folder's weight files. Raises UsageError if files are missing, truncated or
        not safetensors.
        """
        self.folder = folder
        # What the files say of themselves.
        self.metadata: dict[str, str] = {}
        self._tensors: dict[str, Stored] = {}
        for path in weight_files(folder, stem):
            try:
                with safe_open(path, framework="np") as file:
                    entries = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                    starts = tensor_starts(path)
                    self.metadata |= file.metadata() or {}
                    found = {
                        key: Stored(path, tuple(entry.get_shape()), entry.get_dtype(), starts[key])
                        for key, entry in entries.items()
                    }
            except (SafetensorError, OSError) as error:
                raise UsageError(
                    f"{path} is truncated or no safetensors file ({error}); download it again"
                ) from None
            if twice := self._tensors.keys() & found.keys():
                raise UsageError(f"{folder} holds {min(twice)} in two shards; download it again")
            self._tensors |= found

    def keys(self) -> set[str]:
        return set(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensors[key].shape

    def dtype(self, key: str) -> str:
        """As safetensors names it: F32, BF16, …"""
        return self._tensors[key].dtype

    def check_floats(self) -> None:
        """UsageError if weights are stored in anything but `FLOATS`, which is to say quantised."""
        odd = {t.dtype for key, t in self._tensors.items() if not key.endswith(INTEGERS)} - FLOATS.keys()
        if odd:
            raise UsageError(
                f"{self.folder} stores weights as {', '.join(sorted(odd))}; "
                "give a checkpoint in float32, float16 or bfloat16"
            )

    def read(self, key: str, rows: slice | None = None) -> np.ndarray:
        """The tensor, or some `rows` of it, as the file's own memory, not to be written to, which the system
        reads when it is used.

        Mapped anew each time, since what was read of a mapped file counts as this process's memory for as
        long as the map lives. Map and open file live as long as the array does. UsageError if the dtype is
        not one of `DTYPES`, or if the file has changed.
        """
        path, shape, dtype, start = self._readable(key)
        try:
            with path.open("rb") as file:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            array = np.ndarray(shape, DTYPES[dtype], memory, start)
            return array if rows is None else array[rows]
        except (OSError, ValueError, TypeError) as error:  # gone, empty, cut
            raise changed(path, error) from None

    def rows(self, key: str, indices: np.ndarray) -> np.ndarray:
        """Some rows of the tensor, [*indices.shape, *shape[1:]]; of the file nothing else is read.

        IndexError where there is no such row; UsageError as from `read`.
        """
        path, shape, dtype, start = self._readable(key)
        if indices.size and not 0 <= indices.min() <= indices.max() < shape[0]:
            raise IndexError(f"{key} has rows 0 to {shape[0] - 1}, not {indices.min()} to {indices.max()}")
        width = prod(shape[1:]) * np.dtype(DTYPES[dtype]).itemsize
        rows = np.empty((indices.size, width), np.uint8)
        # Not from a map, since the system may map megabytes for every row.
        try:
            with path.open("rb", buffering=0) as file:
                for index, row in zip(indices.flat, rows, strict=True):
                    file.seek(start + int(index) * width)
                    if file.readinto(row) < width:
                        raise OSError("it ends too early")
        except OSError as error:
            raise changed(path, error) from None
        return rows.view(DTYPES[dtype]).reshape(*indices.shape, *shape[1:])

    def _readable(self, key: str) -> Stored:
        stored = self._tensors[key]
        if stored.dtype not in DTYPES:
            raise UsageError(f"{stored.file} stores {key} as {stored.dtype}; give one of {', '.join(DTYPES)}")
        return stored


def changed(path: Path, error: Exception) -> UsageError:
    """The error for a file that was sound when its header was read."""
    return UsageError(f"{path} has changed and cannot be read ({error}); download it again")


def tensor_starts(path: Path) -> dict[str, int]:
    """Where each tensor of a valid safetensors file begins, in bytes from the file's beginning.

    The file begins with the length of its header in 8 bytes; the header is JSON and counts from its own end.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {key: 8 + length + entry["data_offsets"][0] for key, entry in header.items()}


def weight_files(folder: Path, stem: str = STEM) -> list[Path]:
    """The safetensors files of `folder`, in order; the index decides where there is one. `folder` may be the
    only file, or an index, as well.
    """
    if folder.is_file():
        if folder.suffix != ".json":
            return [folder]
        return _present(folder.parent, shard_names(folder))
    if not folder.is_dir():
        raise UsageError(f"{folder} is missing; the checkpoint needs a {folder.name}/ folder")
    inside = file_names(folder)
    entry = weight_entry(inside, stem)
    if entry is None:
        raise no_weights(folder, inside, stem)
    return _present(folder, shard_names(folder / entry) if entry.endswith(".json") else [entry])


def _present(folder: Path, names: list[str]) -> list[Path]:
    """The paths of files in `folder`; UsageError if some are missing."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"{folder} lacks {', '.join(missing)}; download the folder again")
    return [folder / name for name in names]


def file_names(folder: Path) -> list[str]:
    """The names of the files in `folder`, in order."""
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def weight_entry(names: Iterable[str], stem: str = STEM) -> str | None:
    """Of a folder's file `names`, the one that leads to its weights: an index or the only file, of half
    precision where there is no other; None if there are no safetensors.
    """
    known = (
        f"{stem}.safetensors.index.json",
        f"{stem}.safetensors",
        f"{stem}.safetensors.index.{VARIANT}.json",
        f"{stem}.safetensors.{VARIANT}.index.json",  # as older releases of diffusers wrote it
        f"{stem}.{VARIANT}.safetensors",
    )
    return next((name for name in known if name in names), None)


def shard_names(index: Path) -> list[str]:
    """The names of the files that an index lists, in order; UsageError if it is damaged."""
    names = set()
    with suppress(ValueError, KeyError, AttributeError, TypeError):
        names = set(json.loads(index.read_text())["weight_map"].values())
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UsageError(f"{index} is damaged; download it again")
    return sorted(names)


def no_weights(folder: Path | str, names: Iterable[str], stem: str) -> UsageError:
    """The error for a `folder` that holds `names` and no safetensors."""
    pickles = [name for name in names if Path(name).suffix in PICKLES]
    found = f"only {', '.join(pickles)}, and pickles are never loaded" if pickles else "none"
    return UsageError(f"{folder} needs safetensors weights ({stem}.safetensors); found {found}")


def read_config(folder: Path) -> dict:
    """`config.json` of a component."""
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict:
    """A JSON object, in UTF-8 whatever the system prefers; UsageError if it is missing or damaged."""
    try:
        value = json.loads(path.read_bytes())
    except OSError:
        raise UsageError(f"{path} is missing; the checkpoint folder is incomplete") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is no valid JSON; download it again") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no JSON object; download it again")
    return value


def write_component(
    folder: Path, class_name: str, config: dict, rules: Sequence[Rule], parameters: dict, dtype
) -> None:
    """Writes parameters, arrays by their dotted paths, in the official layout: the reverse of loading."""
    keys = official_keys(parameters, rules)
    tensors = {keys[path]: np.asarray(array).astype(dtype, order="C") for path, array in parameters.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{STEM}.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"_class_name": class_name, **config}, indent=2) + "\n")
