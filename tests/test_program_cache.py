"""The cache of compiled programs: entries that are damaged, a disk that is full, a home that is missing."""

import errno
import logging
import pwd

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from jaxspd.runtime import cache

HITS = "/jax/compilation_cache/cache_hits"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A process as new: JAX has opened no cache, and the user's cache folder is this one."""
    monkeypatch.setattr(cache.log, "propagate", True)  # which the command ends
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setattr(
        cache.compilation_cache, "get_file_cache", cache.compilation_cache.get_file_cache
    )  # to be put back
    jax.config.update(names[0], None)
    jax_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def hits() -> int:
    """How many of two programs are found in the cache; they are right in any case."""
    heard = []

    def listen(event, **_):
        heard.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        for factor in (2.0, 3.0):

            def scaled(x, factor=factor):
                return jnp.sin(x) * factor

            program = jax.jit(scaled).lower(jax.ShapeDtypeStruct((4,), jnp.float32)).compile()
            assert program(jnp.zeros(4) + 1)[0] == pytest.approx(factor * 0.8414710, rel=1e-5)
    finally:
        jax.monitoring.unregister_event_listener(listen)
    return heard.count(HITS)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry[: len(entry) // 2],
        lambda entry: b"",
        lambda entry: entry[:-1],
        lambda entry: entry[:200] + bytes([entry[200] ^ 1]) + entry[201:],
    ],
    ids=["cut in half", "empty", "last byte missing", "one bit wrong"],
)
def test_a_damaged_entry_is_replaced(home, damage):
    folder = cache.enable_compilation_cache()
    jnp.zeros(4) + 1  # what the check itself compiles
    hits()
    assert hits() == 2
    entries = [path for path in folder.iterdir() if "scaled" in path.name]
    assert len(entries) == 2
    for path in entries:
        path.write_bytes(damage(path.read_bytes()))
    assert hits() == 0
    assert hits() == 2


def test_a_full_disk_leaves_no_entry_and_is_told_once(home, monkeypatch, caplog):
    folder = cache.enable_compilation_cache()
    jnp.zeros(4) + 1
    before = {*folder.iterdir()}

    def full(self, key, value):
        (folder / f"{key}-cache").write_bytes(value[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.lru_cache.LRUCache, "put", full)
    with caplog.at_level(logging.WARNING, "jaxspd"):
        assert hits() == 0
    assert {*folder.iterdir()} == before
    assert caplog.text.count("No space left on device") == 1


def test_without_a_home_programs_are_not_kept(home, monkeypatch, caplog):
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name)

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(home)
    with caplog.at_level(logging.WARNING, "jaxspd"):
        assert cache.enable_compilation_cache() is None
    assert "XDG_CACHE_HOME" in caplog.text
    assert not list(home.iterdir())  # nor in a folder called ~
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_of_somebody_else_is_not_used(home, monkeypatch, caplog):
    monkeypatch.setattr(cache.os, "getuid", lambda: 12345)
    with caplog.at_level(logging.WARNING, "jaxspd"):
        assert cache.enable_compilation_cache() is None
    assert "belongs to somebody else" in caplog.text
