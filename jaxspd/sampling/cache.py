"""XLA's persistent compilation cache in the user's cache folder."""

import os
import stat
from pathlib import Path

import jax
import platformdirs


def enable_compilation_cache() -> Path | None:
    """Keeps compiled programs for later processes; returns the folder, or None where none is used.

    JAX runs what it finds in the cache as trusted code, so the folder is made readable and writable by
    its owner only, and one that belongs to somebody else is not used. A cache the user has set up
    through JAX's own configuration stays as it is.
    """
    if jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    folder = platformdirs.user_cache_path("jaxspd") / "xla"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, "getuid"):
            if folder.stat().st_uid != os.getuid():
                return None
            folder.chmod(stat.S_IRWXU)
    except OSError:  # a read-only home: compile anew each time
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # The demo's programs compile in about a second; they are worth keeping too.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder
