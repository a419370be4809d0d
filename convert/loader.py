"""Loads official weights into Flax parameters in the target dtype. Names and shapes must match exactly, and a
few tensors are read at a time.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .checkpoint import FLOATS
from .copying import copy, empty
from .errors import UsageError
from .rounding import LARGEST, Quantized
from .table import SCALE, Rule, official_keys

# A function that puts an array where a sharding says. One that leaves it on the host gives the array itself.
Put = Callable[[np.ndarray, jax.sharding.Sharding | None], Any]
LISTED = 8
# Number of arrays that are copied at the same time: a single copy would wait for its file or for new memory.
THREADS = min(8, os.cpu_count() or 1)


def flat_parameters(parameters: nnx.State) -> dict[str, Any]:
    """The parameters by dotted path, in the order of the tree's leaves."""
    return {
        ".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(parameters)
    }


def assign(
    keys: set[str],
    shape_of: Callable[[str], tuple[int, ...]],
    parameters: dict[str, Any],
    rules: Sequence[Rule],
) -> dict[str, str]:
    """The official key of every parameter, by path, after all names and shapes are checked.

    Every official key must be used once and every parameter filled once. Otherwise raises UsageError, which
    lists missing keys, keys that are left over and tensors of the wrong shape.
    """
    table = official_keys(parameters, rules)
    missing, misshapen = [], []
    for path, key in table.items():
        wanted = parameters[path].shape
        if key not in keys:
            missing.append(key)
        elif shape_of(key) != wanted:
            misshapen.append(f"{key} {list(shape_of(key))} instead of {list(wanted)}")
    faults = [
        f"{len(names)} {what}: {', '.join(sorted(names)[:LISTED])}" + (", …" if len(names) > LISTED else "")
        for what, names in (
            ("missing", missing),
            ("left over", keys - set(table.values())),
            ("misshapen", misshapen),
        )
        if names
    ]
    if faults:
        raise UsageError("; ".join(faults))
    return table


class Tensors(Protocol):
    """Weights by official key, however their files name and store them: a `Checkpoint`, or what reads like
    one. `folder` and `config` name the weights and their configuration in messages.
    """

    folder: Path
    config: str

    def keys(self) -> set[str]: ...
    def shape(self, key: str) -> tuple[int, ...]: ...
    def dtype(self, key: str) -> str: ...
    def read(self, key: str) -> np.ndarray: ...
    def check_floats(self) -> None: ...


def match(checkpoint: Tensors, parameters, rules: Sequence[Rule]) -> dict[str, str]:
    """`assign` for a checkpoint's tensors. Its UsageError names the checkpoint."""
    try:
        return assign(checkpoint.keys(), checkpoint.shape, parameters, rules)
    except UsageError as error:
        raise UsageError(f"{checkpoint.folder} does not fit {checkpoint.config}: {error}") from None


def quantized_keys(abstract: nnx.State, rules: Sequence[Rule]) -> dict[str, np.dtype]:
    """The official keys of the parameters of `abstract` that are in 8 bits, with their dtypes."""
    parameters = flat_parameters(abstract)
    return {
        key: np.dtype(parameters[path].dtype)
        for path, key in official_keys(parameters, rules).items()
        if np.dtype(parameters[path].dtype) in LARGEST
    }


def quantized(checkpoint, abstract: nnx.State, rules: Sequence[Rule]):
    """`checkpoint`, whose weights are rounded to 8 bits while they are read if `abstract` has them in 8
    bits.
    """
    keys = quantized_keys(abstract, rules)
    return Quantized(checkpoint, keys) if keys else checkpoint


def holds_exactly(abstract: nnx.State, checkpoint: Tensors, rules: Sequence[Rule]) -> bool:
    """Whether every parameter of `abstract` is in float32 or in the dtype in which its official tensor is
    stored.
    """
    parameters = flat_parameters(abstract)
    table = match(checkpoint, parameters, rules)
    return all(
        parameters[path].dtype in (jnp.float32, FLOATS.get(checkpoint.dtype(key)))
        for path, key in table.items()
    )


@dataclass(frozen=True)
class StoredWeight:
    """A parameter in its file. `fetch` reads it in the target dtype and puts it in its place."""

    checkpoint: Tensors
    key: str
    target: jax.ShapeDtypeStruct

    @property
    def shape(self) -> tuple[int, ...]:
        return self.target.shape

    @property
    def dtype(self) -> np.dtype:
        return self.target.dtype

    @property
    def nbytes(self) -> int:
        return self.target.size * self.target.dtype.itemsize

    def fetch(self, put: Put = jax.device_put) -> jax.Array:
        """The array, read on the host in the target dtype and handed to `put` with the target's sharding."""
        array = empty(self.shape, self.dtype)
        copy(array, self.checkpoint.read(self.key))
        return jax.block_until_ready(put(array, self.target.sharding))


def stored_parameters(checkpoint: Tensors, abstract: nnx.State, table: dict[str, str]) -> nnx.State:
    """A tree like `abstract` with a `StoredWeight` in place of each array. `abstract` gives shapes, target
    dtypes and, where set, shardings; `table` is the result of `match`.
    """
    leaves = [
        StoredWeight(checkpoint, table[path], target) for path, target in flat_parameters(abstract).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)  # in the order of the tree's leaves


def load_parameters(
    checkpoint: Tensors, abstract: nnx.State, rules: Sequence[Rule], put: Put = jax.device_put
) -> nnx.State:
    """`abstract` filled from `checkpoint`.

    Only a few arrays are read at a time. So the host holds no more than these, besides what `put` keeps.
    """
    table = match(checkpoint, flat_parameters(abstract), rules)
    checkpoint.check_floats()
    return load(stored_parameters(checkpoint, abstract, table), put)


def refetch(
    checkpoint, abstract: nnx.State, rules: Sequence[Rule], keys: set[str], put: Put = jax.device_put
) -> Iterator[tuple[tuple, jax.Array]]:
    """Yields the path and the array of each parameter of `abstract` that holds a tensor of `keys`."""
    table = official_keys(flat_parameters(abstract), rules)
    tensors = quantized(checkpoint, abstract, rules)
    for path, variable in nnx.to_flat_state(abstract):
        key = table[".".join(map(str, path))]
        if key in keys or key.removesuffix(SCALE) in keys:
            yield path, StoredWeight(tensors, key, variable.get_value()).fetch(put)


def load(stored: nnx.State, put: Put = jax.device_put) -> nnx.State:
    """A tree of `StoredWeight` with every array fetched."""
    leaves, structure = jax.tree.flatten(stored)
    with ThreadPoolExecutor(THREADS) as pool:
        return jax.tree.unflatten(structure, pool.map(lambda leaf: leaf.fetch(put), leaves))
