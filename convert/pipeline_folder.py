"""Writes a pipeline's folder anew, with its transformer's weights in another format or from another file."""

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from math import prod
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from .checkpoint import FLOATS, STEM, Checkpoint
from .errors import UsageError
from .loader import flat_parameters, match
from .orbax_store import NAME, write_store
from .places import check_place, is_inside
from .single_file import replaced_transformer

# The largest size of a file of weights in bytes. So much is gathered in memory before it is written.
SHARD = 2e9


def check_new(output: Path) -> None:
    """Raises UsageError if the folder `output` exists or cannot be made."""
    cure = "choose another output_path"
    check_place(output, cure)
    if os.path.lexists(output):
        raise UsageError(f"{output} exists already; {cure}")


def convert_pipeline(family, output: Path, format: str = "orbax") -> None:
    """Writes `family`'s pipeline folder anew as `output`.

    The transformer becomes an Orbax checkpoint, or safetensors in diffusers' layout if `format` is
    "safetensors". Its weights may come from another file. They keep their stored dtype; quantised weights get
    a dtype that loses nothing. All other components are copied.

    The folder appears when it is complete, or not at all. Raises UsageError if it cannot be written.
    """
    source, replaced = family.folder / "transformer", replaced_transformer(family)
    if replaced is None and (source / NAME).is_dir():
        raise UsageError(f"{family.folder} is converted already; use it as it is")
    check_new(output)
    if is_inside(output, family.folder):
        raise UsageError(f"{output} lies in the model's own folder; choose another output_path")
    checkpoint = replaced or Checkpoint(source)
    checkpoint.check_floats()
    table = match(checkpoint, flat_parameters(family.abstract_parameters(jnp.float32)), family.rules)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".", suffix=".part", dir=output.parent))
    except OSError as error:
        raise UsageError(f"{output} cannot be written ({error.strerror})") from None
    weights = family.transformer_weights_path
    left = {path.resolve() for path in ([weights] if weights else [])}
    try:
        shutil.copytree(
            family.folder,
            temporary,
            dirs_exist_ok=True,
            ignore=lambda folder, names: [
                name
                for name in names
                if (Path(folder) / name).resolve() in left or (Path(folder) == source and _is_weights(name))
            ],
        )
        transformer = temporary / "transformer"
        if not (transformer / "config.json").exists():
            transformer.mkdir(exist_ok=True)
            (transformer / "config.json").write_text(json.dumps(asdict(family.config), indent=2) + "\n")
        if format == "orbax":
            write_store(transformer, checkpoint, family)
        else:
            write_shards(transformer, checkpoint, sorted(table.values()))
        temporary.chmod(0o755)
        temporary.rename(output)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):  # the disk is full, or a file cannot be read
            # shutil.Error holds (source, target, reason) of every failed copy.
            reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror
            raise UsageError(f"{output} cannot be written ({reason})") from None
        raise


def _is_weights(name: str) -> bool:
    """Whether an entry of the transformer's folder is its weights or an index of them."""
    return name == NAME or ".safetensors" in name or name.startswith(STEM)


def write_shards(folder: Path, checkpoint, keys: list[str]) -> None:
    """Writes the tensors `keys` in diffusers' layout, as one file or as several files and an index."""
    shards: list[list[str]] = [[]]
    sizes = {}
    for key in keys:
        sizes[key] = prod(checkpoint.shape(key)) * np.dtype(FLOATS[checkpoint.dtype(key)]).itemsize
        if shards[-1] and sum(sizes[held] for held in shards[-1]) + sizes[key] > SHARD:
            shards.append([])
        shards[-1].append(key)
    places: dict[str, str] = {}
    for number, held in enumerate(shards, 1):
        count = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        name = f"{STEM}{count}.safetensors"
        tensors = {key: np.ascontiguousarray(checkpoint.read(key)) for key in held}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(held, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
