"""The components of a checkpoint beside its transformer, as tests use them."""

from pathlib import Path

import jax.numpy as jnp

from jaxspd.components.pipeline import Components
from jaxspd.families import open_family
from jaxspd.families.base import BaseFamily


def components(model: Path | BaseFamily, dtype=jnp.float32) -> Components:
    """Of a folder or an opened family."""
    return Components(model if isinstance(model, BaseFamily) else open_family(model), dtype)
