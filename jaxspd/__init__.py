"""jaxspd: spectral progressive diffusion in JAX.

Importing this package does not import jax. The names below are imported when they are first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_HOMES = {
    "DiffGenerator": "jaxspd.generator",
    "GenerationResult": "jaxspd.results",
    "SamplingParams": "jaxspd.request",
    "UsageError": "jaxspd.errors",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxspd' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
