"""Converted weights as an Orbax checkpoint, `transformer/orbax` in a pipeline's folder. It holds arrays by
the parameters' dotted paths.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .checkpoint import FLOATS, Checkpoint
from .errors import UsageError, first_line
from .loader import Put, flat_parameters, holds_exactly, load_parameters, match, quantized, quantized_keys
from .table import SCALE, official_keys

NAME = "orbax"
# The folder of a pipeline's transformer, or of the first of two.
PART = "transformer"


def check_transformer(folder: Path, abstract: nnx.State, rules, weights=None, part: str = PART) -> None:
    """Raises UsageError if names, shapes or dtypes show that `load_transformer` cannot fill `abstract`."""
    store = folder / part / NAME
    if weights is not None or not store.is_dir():
        checkpoint = weights or Checkpoint(folder / part)
        # This comes first, since `quantized` adds keys for scales.
        checkpoint.check_floats()
        match(quantized(checkpoint, abstract, rules), flat_parameters(abstract), rules)
        return
    found = {path: array[0] for path, array in _arrays(store).items()}
    wanted = {path: array.shape for path, array in flat_parameters(abstract).items()}
    for path in wanted.keys() - found.keys():
        if path.endswith(SCALE):  # loading computes it from the weight
            del wanted[path]
    if odd := sorted(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path)):
        raise UsageError(f"{store} does not fit its config.json ({odd[0]}); convert it again")


def _arrays(store: Path) -> dict[str, tuple[tuple[int, ...] | None, Any]]:
    """Shape and dtype of each array of `store`, by path. Raises UsageError if the store is damaged."""
    import orbax.checkpoint as ocp

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.metadata(store.absolute()).item_metadata.tree
        # Older conversions kept folders of arrays, which have no shape.
        return {path: (getattr(a, "shape", None), getattr(a, "dtype", None)) for path, a in tree.items()}
    except Exception as error:  # Orbax has no exception for damaged checkpoints
        raise _damaged(store, error) from error


def is_store(folder: Path) -> bool:
    """Whether `folder` is an Orbax checkpoint."""
    return (folder / "_METADATA").is_file()


class OrbaxWeights:
    """The arrays of a converted transformer, by official key. Reads like a `Checkpoint`."""

    config = "its config.json"

    def __init__(self, store: Path, rules):
        self.folder, self._found = store, _arrays(store)
        self._paths = {key: path for path, key in official_keys(self._found, rules).items()}

    def keys(self) -> set[str]:
        return set(self._paths)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._found[self._paths[key]][0] or ()

    def dtype(self, key: str) -> str:
        """The dtype as safetensors would name it."""
        dtype = self._found[self._paths[key]][1]
        return next((name for name, known in FLOATS.items() if known == dtype), str(dtype))

    def check_floats(self) -> None:
        """Does nothing: conversion writes only floats."""

    def read(self, key: str) -> np.ndarray:
        import orbax.checkpoint as ocp

        path = self._paths[key]
        wanted = ocp.args.PyTreeRestore(
            item={path: 0},
            restore_args={path: ocp.RestoreArgs(restore_type=np.ndarray)},
            partial_restore=True,
        )
        try:
            return ocp.PyTreeCheckpointer().restore(self.folder.absolute(), args=wanted)[path]
        except Exception as error:
            raise _damaged(self.folder, error) from error


def _damaged(store: Path, error: Exception) -> UsageError:
    line = first_line(error)
    return UsageError(f"{store} does not fit its config.json or is damaged ({line}); convert it again")


def stored_transformer(folder: Path, rules, part: str = PART):
    """The tensors of the transformer in a pipeline's folder, official or converted, by official key."""
    store = folder / part / NAME
    return OrbaxWeights(store, rules) if store.is_dir() else Checkpoint(folder / part)


def load_transformer(
    folder: Path, abstract: nnx.State, rules, weights=None, part: str = PART, put: Put = jax.device_put
) -> nnx.State:
    """The parameters of the transformer in a pipeline's folder, official or converted.

    `weights`, if given, replace the folder's and read like a `Checkpoint`. Parameters are put where the
    shardings of `abstract` say, by default on the first device. `put` puts arrays that are read one at a
    time.
    """
    store = folder / part / NAME
    if weights is not None or not store.is_dir() or quantized_keys(abstract, rules):
        given = weights or stored_transformer(folder, rules, part)
        return load_parameters(quantized(given, abstract, rules), abstract, rules, put)
    import orbax.checkpoint as ocp  # imported here: it is slow, and few need it

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        path: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding or device)
        for path, p in flat_parameters(abstract).items()
    }
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(store.absolute(), target)
    except Exception as error:  # Orbax has no exception for damaged checkpoints
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):  # of the host or the device
            raise
        raise _damaged(store, error) from error
    return jax.tree.unflatten(jax.tree.structure(abstract), [restored[path] for path in target])


def write_store(folder: Path, checkpoint, family) -> None:
    """Writes the transformer's parameters from `checkpoint` as an Orbax checkpoint in `folder`, in the
    narrowest dtype that loses nothing.
    """
    import orbax.checkpoint as ocp

    dtype = next(
        (
            dtype
            for dtype in (jnp.bfloat16, jnp.float16)
            if holds_exactly(family.abstract_parameters(dtype), checkpoint, family.rules)
        ),
        jnp.float32,  # which holds the values of both exactly
    )
    parameters = load_parameters(
        checkpoint, family.abstract_parameters(dtype), family.rules, put=lambda array, _: array
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / NAME).absolute(), flat_parameters(parameters))
