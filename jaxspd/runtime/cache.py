"""XLA's persistent compilation cache in the user's cache folder."""

import hashlib
import logging
import os
import stat
from contextlib import suppress
from pathlib import Path

import jax
import platformdirs
from jax._src import compilation_cache, lru_cache

log = logging.getLogger("jaxspd")


def enable_compilation_cache() -> Path | None:
    """Keeps compiled programs for later processes, and returns the folder that they are in.

    If no folder can be used, this logs a warning and returns None. JAX runs programs from the cache as
    trusted code, so the folder is made accessible to its owner only, and another owner's folder is not used.
    A cache that the user has set up through JAX's own configuration stays as it is.
    """
    if set_up := jax.config.values["jax_compilation_cache_dir"]:
        return Path(set_up)
    try:
        folder = platformdirs.user_cache_path("jaxspd") / "xla"
        if not folder.is_absolute():
            raise RuntimeError("the home folder is not known")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, "getuid"):
            if folder.stat().st_uid != os.getuid():
                raise RuntimeError(f"{folder} belongs to somebody else")
            folder.chmod(stat.S_IRWXU)
    except (OSError, RuntimeError) as error:  # a read-only home, or none
        log.warning("compiled programs are not kept (%s); XDG_CACHE_HOME names another folder", error)
        return None
    # JAX calls this function when it first compiles. Other folders keep JAX's own cache.
    others = compilation_cache.get_file_cache
    compilation_cache.get_file_cache = lambda path: (
        (ProgramCache(path), path) if path == str(folder) else others(path)
    )
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default JAX keeps only programs that took over a second to compile; the demo's take about that.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


class ProgramCache(lru_cache.LRUCache):
    """JAX's cache in files, with a SHA-256 at the end of each entry.

    An entry that a full disk or a crash has damaged is removed, so that it is written again. JAX's own cache
    keeps such an entry, fails to read it, and warns each time.
    """

    def __init__(self, path: str):
        super().__init__(path, max_size=jax.config.values["jax_compilation_cache_max_size"])
        self._told = False

    def get(self, key: str) -> bytes | None:
        entry = super().get(key)
        if entry is None:
            return None
        value, digest = entry[:-32], entry[-32:]
        if hashlib.sha256(value).digest() == digest:
            return value
        self._remove(key)
        return None

    def put(self, key: str, value: bytes) -> None:
        try:
            super().put(key, value + hashlib.sha256(value).digest())
        except OSError as error:
            self._remove(key)
            if not self._told:  # one warning is enough: a full disk refuses the other entries too
                log.warning("compiled programs are not kept (%s)", error)
            self._told = True

    def _remove(self, key: str) -> None:
        for kind in ("cache", "atime"):
            with suppress(OSError):
                Path(self._path, f"{key}-{kind}").unlink()
