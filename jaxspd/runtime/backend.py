"""Starting JAX's backend, and the share of a device's memory that it may take."""

import os

import jax

from jaxspd.errors import UsageError
from jaxspd.runtime.malloc import keep_freed_memory

# JAX reads these variables when its backend starts. That is when a device is first asked for, not when JAX is
# imported, so importing this module is early enough. What the user has set stays.
#
# JAX takes memory only as it needs it, since a desktop or another program may use the same device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# The largest share that JAX may take; its own default is 0.75. Qwen-Image's step takes 41.4 GB. That is 81 %
# of an RTX A6000's 51.0 GB, and 86 % of the 48.3 GB that it has with error correction on. The remaining
# tenth, about 5 GB there, holds JAX's context (some 0.5 GB), workspaces of kernels and a desktop (up to 1
# GB). JAX's pool grows by doubling and gives nothing back, so a model that takes over half of the limit may
# end up holding all of it.
MEMORY_SHARE = 0.9
# The variable's current and its old name. JAX refuses to start if both are set.
SHARE_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
if not any(os.environ.get(name) for name in SHARE_NAMES):
    os.environ[SHARE_NAMES[0]] = str(MEMORY_SHARE)


def start_backend() -> None:
    """Starts JAX's backend, unless it has started. Raises UsageError if the requested one cannot start.

    A CPU's arrays lie in the C library's memory, so on a CPU that library is told to keep freed memory.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # CUDA without a GPU: an AssertionError without text
        line = (str(error).strip().splitlines() or ["no such device was found"])[0]
        asked = jax.config.values["jax_platforms"]
        cure = (
            f"unset JAX_PLATFORMS, which is {asked}, or set it to cpu"
            if asked
            else "set JAX_PLATFORMS to cpu"
        )
        raise UsageError(f"JAX cannot start ({line}); {cure}") from error
    if jax.default_backend() == "cpu":
        keep_freed_memory()
