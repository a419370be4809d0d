"""JAX's backend, and what it may take of memory."""

import os

import jax

from jaxspd.errors import UsageError
from jaxspd.runtime.malloc import keep_freed_memory

# JAX reads these when its backend starts, which is when a device is first asked for, not when it is imported;
# so they are set as soon as this module is. What the user has set stays.
#
# JAX takes memory as it needs it, since others may work on the same device: a desktop, or a comparison.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# At most this share, where JAX's own limit is 0.75. Qwen-Image's step takes 41.4 GB: 81 % of an RTX A6000's
# 51.0 GB, 86 % of the 48.3 GB that are left of them with error correction on. The tenth that remains, about
# 5 GB there, holds JAX's context (some 0.5 GB), workspaces of kernels and a desktop (up to 1 GB). JAX's pool
# grows by doubling and gives nothing back, so a model that takes over half of the limit may well come to hold
# all of it.
MEMORY_SHARE = 0.9
# The name of today and the old one: JAX refuses to start where both are set.
SHARE_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
if not any(os.environ.get(name) for name in SHARE_NAMES):
    os.environ[SHARE_NAMES[0]] = str(MEMORY_SHARE)


def start_backend() -> None:
    """Starts JAX's backend, unless it is at work; UsageError where there is none such as was asked for.

    On a CPU, where all that is computed lies in the C library's memory, freed memory is kept from then on.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter, without a word, for CUDA without a GPU
        line = (str(error).strip().splitlines() or ["no such device was found"])[0]
        asked = jax.config.jax_platforms
        cure = (
            f"unset JAX_PLATFORMS, which is {asked}, or set it to cpu"
            if asked
            else "set JAX_PLATFORMS to cpu"
        )
        raise UsageError(f"JAX cannot start ({line}); {cure}") from error
    if jax.default_backend() == "cpu":
        keep_freed_memory()
