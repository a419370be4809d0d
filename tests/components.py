"""Opens the components of a checkpoint other than its transformer."""

from pathlib import Path

import jax.numpy as jnp

from jaxspd.components.pipeline import Components
from jaxspd.families import open_family
from jaxspd.families.base import BaseFamily


def components(model: Path | BaseFamily, dtype=jnp.float32) -> Components:
    """The components of a folder or of an opened family."""
    return Components(model if isinstance(model, BaseFamily) else open_family(model), dtype)
