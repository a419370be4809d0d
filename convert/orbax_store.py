"""Converted weights kept as an Orbax checkpoint: `transformer/orbax` in a pipeline folder, arrays by the
parameters' dotted paths.
"""

import os
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from .checkpoint import Checkpoint, weight_files
from .errors import UsageError, first_line
from .loader import flat_parameters, holds_exactly, load_parameters, match
from .places import check_place, is_inside

NAME = "orbax"


def check_transformer(folder: Path, abstract: nnx.State, rules) -> None:
    """UsageError if `load_transformer` could not fill `abstract`, as far as names, shapes and dtypes tell."""
    store = folder / "transformer" / NAME
    if not store.is_dir():
        checkpoint = Checkpoint(folder / "transformer")
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


def load_transformer(folder: Path, abstract: nnx.State, rules) -> nnx.State:
    """The transformer's parameters from a pipeline folder, official or converted, on the first device or
    where the shardings of `abstract` say.
    """
    store = folder / "transformer" / NAME
    if not store.is_dir():
        return load_parameters(Checkpoint(folder / "transformer"), abstract, rules)
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


def check_new(output: Path) -> None:
    """UsageError if the folder to be written exists or cannot be made."""
    cure = "choose another output_path"
    check_place(output, cure)
    if os.path.lexists(output):
        raise UsageError(f"{output} exists already; {cure}")


def convert_pipeline(family, output: Path) -> None:
    """Writes `family`'s pipeline folder anew with the transformer as Orbax checkpoint.

    The weights keep the dtype they are stored in; every other component is copied. The folder
    appears when it is complete, or not at all.
    """
    import orbax.checkpoint as ocp

    source = family.folder / "transformer"
    if (source / NAME).is_dir():
        raise UsageError(f"{family.folder} is converted already; use it as it is")
    check_new(output)
    if is_inside(output, family.folder):
        raise UsageError(f"{output} lies in the model's own folder; choose another output_path")
    checkpoint = Checkpoint(source)
    # The narrowest type that loses nothing; float32 holds every other.
    dtype = next(
        (
            dtype
            for dtype in (jnp.bfloat16, jnp.float16)
            if holds_exactly(family.abstract_parameters(dtype), checkpoint, family.rules)
        ),
        jnp.float32,
    )
    parameters = load_parameters(
        checkpoint, family.abstract_parameters(dtype), family.rules, put=lambda array, _: array
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".", suffix=".part", dir=output.parent))
    except OSError as error:
        raise UsageError(f"{output} cannot be written ({error.strerror})") from None
    try:
        weights = {path.resolve() for path in weight_files(source)}
        shutil.copytree(
            family.folder,
            temporary,
            dirs_exist_ok=True,
            ignore=lambda folder, names: [
                name
                for name in names
                if (Path(folder) / name).resolve() in weights
                # Indexes, and the same weights at half precision.
                or (Path(folder) == source and ".safetensors" in name)
            ],
        )
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((temporary / "transformer" / NAME).absolute(), flat_parameters(parameters))
        temporary.chmod(0o755)
        temporary.rename(output)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):  # a full disk, or a file that cannot be read
            # When it copies, shutil gathers (source, target, reason) of every failure.
            reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror
            raise UsageError(f"{output} cannot be written ({reason})") from None
        raise
