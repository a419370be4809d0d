"""Converted weights kept as an Orbax checkpoint: `transformer/orbax` in a pipeline folder, arrays by the
parameters' dotted paths.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from .checkpoint import Checkpoint
from .errors import UsageError, first_line
from .loader import flat_parameters, holds_exactly, load_parameters, match

NAME = "orbax"


def check_transformer(folder: Path, abstract: nnx.State, rules, weights=None) -> None:
    """UsageError if `load_transformer` could not fill `abstract`, as far as names, shapes and dtypes tell."""
    store = folder / "transformer" / NAME
    if weights is not None or not store.is_dir():
        checkpoint = weights or Checkpoint(folder / "transformer")
        # First, since what quantises weights adds keys of its own.
        checkpoint.check_floats()
        match(checkpoint, flat_parameters(abstract), rules)
        return
    import orbax.checkpoint as ocp

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.metadata(store.absolute()).item_metadata.tree
        # A folder of arrays, which has no shape, is how older conversions kept them.
        found = {path: getattr(array, "shape", None) for path, array in tree.items()}
    except Exception as error:  # Orbax has no exception of its own for a damaged checkpoint
        raise _damaged(store, error) from error
    wanted = {path: array.shape for path, array in flat_parameters(abstract).items()}
    if odd := sorted(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path)):
        raise UsageError(f"{store} does not fit its config.json ({odd[0]}); convert it again")


def _damaged(store: Path, error: Exception) -> UsageError:
    line = first_line(error)
    return UsageError(f"{store} does not fit its config.json or is damaged ({line}); convert it again")


def load_transformer(folder: Path, abstract: nnx.State, rules, weights=None) -> nnx.State:
    """The transformer's parameters from a pipeline folder, official or converted, or from `weights`, read as
    a `Checkpoint` is, in its place; on the first device or where the shardings of `abstract` say.
    """
    store = folder / "transformer" / NAME
    if weights is not None or not store.is_dir():
        return load_parameters(weights or Checkpoint(folder / "transformer"), abstract, rules)
    import orbax.checkpoint as ocp  # here, since most checkpoints need none of it and it takes a while

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        path: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding or device)
        for path, p in flat_parameters(abstract).items()
    }
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(store.absolute(), target)
    except Exception as error:  # Orbax has no exception of its own for a damaged checkpoint
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):  # the host's or the device's
            raise
        raise _damaged(store, error) from error
    return jax.tree.unflatten(jax.tree.structure(abstract), [restored[path] for path in target])


def write_store(folder: Path, checkpoint, family) -> None:
    """Writes the transformer's parameters, read from `checkpoint`, as `folder`'s Orbax checkpoint, in the
    narrowest dtype that loses nothing.
    """
    import orbax.checkpoint as ocp

    dtype = next(
        (
            dtype
            for dtype in (jnp.bfloat16, jnp.float16)
            if holds_exactly(family.abstract_parameters(dtype), checkpoint, family.rules)
        ),
        jnp.float32,  # which holds every other
    )
    parameters = load_parameters(
        checkpoint, family.abstract_parameters(dtype), family.rules, put=lambda array, _: array
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / NAME).absolute(), flat_parameters(parameters))
