"""Checkpoints in safetensors: a folder, one file or shards. Tensors are read and written one at a time."""

import json
import mmap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # gives NumPy the type bfloat16 of most official weights
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .errors import UsageError
from .table import Rule, official_keys

STEM = "diffusion_pytorch_model"
# Some checkpoints also hold weights in half precision, and a few hold nothing else.
VARIANT = "fp16"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
# Stored types of weights, by their names in safetensors.
FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# The same with the types of quantised weights, counters and indices.
DTYPES = FLOATS | {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I8": np.int8,
    "U8": np.uint8,
    "I32": np.int32,
    "I64": np.int64,
}
# Endings of the names of counters and indices, which some classes store beside their weights.
INTEGERS = ("position_ids", "num_batches_tracked")


class Stored(NamedTuple):
    """A tensor of a safetensors file. `dtype` has safetensors' name for it: F32, BF16, …. `start` is in bytes
    from the beginning of the file.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int


class Checkpoint:
    """The tensors of one component: of a folder, a file, or the files that an index lists. Headers are read
    at once, tensors when they are asked for.
    """

    # What determines the shapes of the tensors; for messages.
    config = "its config.json"

    def __init__(self, folder: Path, stem: str = STEM):
        """`stem` is the stem of the names of a folder's weight files. Raises UsageError if files are missing,
        truncated or not safetensors.
        """
        self.folder = folder
        # The metadata in the files' headers.
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
        """The stored dtype as safetensors names it: F32, BF16, …."""
        return self._tensors[key].dtype

    def check_floats(self) -> None:
        """Raises UsageError if weights are not stored in one of `FLOATS`, that is, if they are quantised."""
        odd = {t.dtype for key, t in self._tensors.items() if not key.endswith(INTEGERS)} - FLOATS.keys()
        if odd:
            raise UsageError(
                f"{self.folder} stores weights as {', '.join(sorted(odd))}; "
                "give a checkpoint in float32, float16 or bfloat16"
            )

    def read(self, key: str, rows: slice | None = None) -> np.ndarray:
        """The tensor, or some `rows` of it. The array is the mapped file: it is read-only, and the system
        reads the file when the array is used.

        Each call maps the file anew: parts that have been read count as this process's memory for as long as
        the map exists. The map and the open file live as long as the array. Raises UsageError if the dtype is
        not in `DTYPES` or the file has changed.
        """
        path, shape, dtype, start = self._readable(key)
        try:
            with path.open("rb") as file:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            array = np.ndarray(shape, DTYPES[dtype], memory, start)
            return array if rows is None else array[rows]
        except (OSError, ValueError, TypeError) as error:  # deleted, emptied or truncated
            raise changed(path, error) from None

    def rows(self, key: str, indices: np.ndarray) -> np.ndarray:
        """The rows `indices` of the tensor, `[*indices.shape, *shape[1:]]`. Nothing else of the file is read.

        Raises IndexError if there is no such row, and UsageError as `read` does.
        """
        path, shape, dtype, start = self._readable(key)
        if indices.size and not 0 <= indices.min() <= indices.max() < shape[0]:
            raise IndexError(f"{key} has rows 0 to {shape[0] - 1}, not {indices.min()} to {indices.max()}")
        width = prod(shape[1:]) * np.dtype(DTYPES[dtype]).itemsize
        rows = np.empty((indices.size, width), np.uint8)
        # The file is not mapped here, since the system may read megabytes for every row.
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
    """The error for a file whose header could be read and whose tensors cannot."""
    return UsageError(f"{path} has changed and cannot be read ({error}); download it again")


def tensor_starts(path: Path) -> dict[str, int]:
    """Where each tensor of a valid safetensors file begins, in bytes from the beginning of the file.

    The file begins with the length of its header in 8 bytes. The header is JSON, and its offsets count from
    the header's end.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {key: 8 + length + entry["data_offsets"][0] for key, entry in header.items()}


def weight_files(folder: Path, stem: str = STEM) -> list[Path]:
    """The safetensors files of `folder`, in order. An index decides if there is one. `folder` may also be the
    only file, or an index.
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
    """The paths of the files `names` in `folder`. Raises UsageError if some are missing."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"{folder} lacks {', '.join(missing)}; download the folder again")
    return [folder / name for name in names]


def file_names(folder: Path) -> list[str]:
    """The names of the files in `folder`, in order."""
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def weight_entry(names: Iterable[str], stem: str = STEM) -> str | None:
    """The one of a folder's file `names` that leads to its weights: an index or the only file. Files in half
    precision are used only if there are no others. None if there are no safetensors files.
    """
    known = (
        f"{stem}.safetensors.index.json",
        f"{stem}.safetensors",
        f"{stem}.safetensors.index.{VARIANT}.json",
        f"{stem}.safetensors.{VARIANT}.index.json",  # written by older releases of diffusers
        f"{stem}.{VARIANT}.safetensors",
    )
    return next((name for name in known if name in names), None)


def shard_names(index: Path) -> list[str]:
    """The names of the files that an index lists, in order. Raises UsageError if the index is damaged."""
    names = set()
    with suppress(ValueError, KeyError, AttributeError, TypeError):
        names = set(json.loads(index.read_text())["weight_map"].values())
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UsageError(f"{index} is damaged; download it again")
    return sorted(names)


def no_weights(folder: Path | str, names: Iterable[str], stem: str) -> UsageError:
    """The error for a `folder` whose files `names` are not safetensors."""
    pickles = [name for name in names if Path(name).suffix in PICKLES]
    found = f"only {', '.join(pickles)}, and pickles are never loaded" if pickles else "none"
    return UsageError(f"{folder} needs safetensors weights ({stem}.safetensors); found {found}")


def read_config(folder: Path) -> dict:
    """The `config.json` in a component's folder."""
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict:
    """The JSON object in the file `path`, which is UTF-8 whatever the system prefers. Raises UsageError if
    the file is missing or damaged.
    """
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
    """Writes parameters in the official layout, the reverse of loading. `parameters` are arrays by dotted
    path.
    """
    keys = official_keys(parameters, rules)
    tensors = {keys[path]: np.asarray(array).astype(dtype, order="C") for path, array in parameters.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{STEM}.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"_class_name": class_name, **config}, indent=2) + "\n")
