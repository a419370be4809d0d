"""How much memory the host has, and what becomes of what is freed."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxspd.runtime import backend, memory

ROOT = Path(__file__).parents[1]
SIZE, GIB = 64 * 2**20, 2**30


def page_faults() -> int:
    """Pages the system had to provide for an array that is made, filled and freed; the fewest of some tries,
    since other threads ask for pages too.
    """
    tries = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.empty(SIZE, np.uint8).fill(1)
        tries.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(tries)


def measure() -> None:
    """Prints the pages asked for again before the backend is at work, and then."""
    # Given back and asked for again; a system with huge pages provides them by the hundred.
    page_faults()
    print(page_faults())
    backend.start_backend()
    page_faults()
    print(page_faults())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_is_used_again_on_a_cpu():
    # In a process of its own, whose heap no other test has filled.
    code = "from tests.test_memory import measure; measure()"
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=True,
        capture_output=True,
        text=True,
    )
    returned, kept = map(int, said.stdout.split())
    assert kept < SIZE // resource.getpagesize() / 1000 < returned


def test_freed_memory_is_left_to_the_c_library_elsewhere(monkeypatch):
    monkeypatch.setattr(backend, "keep_freed_memory", lambda: 1 / 0)
    monkeypatch.setattr(backend.jax, "default_backend", lambda: "gpu")
    backend.start_backend()
    monkeypatch.setattr(backend.jax, "default_backend", lambda: "cpu")
    with pytest.raises(ZeroDivisionError):
        backend.start_backend()


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of 64 GiB and 8 of swap, without a container; the folder where one would say what it may."""

    class Memory:
        available, total = 50 * GIB, 64 * GIB

    class Swap:
        total = 8 * GIB

    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: Memory)
    monkeypatch.setattr(memory.psutil, "swap_memory", lambda: Swap)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    return tmp_path


def test_a_container_has_less_memory_than_its_machine(machine):
    assert memory.host_memory() == (50 * GIB, 64 * GIB)
    (machine / "memory.max").write_text(f"{16 * GIB}\n")
    (machine / "memory.current").write_text(f"{12 * GIB}\n")
    (machine / "memory.stat").write_text(f"anon {5 * GIB}\nactive_file {3 * GIB}\ninactive_file {4 * GIB}\n")
    assert memory.host_memory() == (11 * GIB, 16 * GIB)
    (machine / "memory.max").write_text("max\n")
    assert memory.host_memory() == (50 * GIB, 64 * GIB)


def test_a_program_may_take_memory_and_swap(machine):
    class Device:
        memory_stats = staticmethod(lambda: None)

    assert memory.memory_limit(Device) == 72 * GIB
    (machine / "memory.max").write_text(f"{16 * GIB}\n")
    (machine / "memory.current").write_text("0\n")
    (machine / "memory.stat").write_text("anon 0\n")
    assert memory.memory_limit(Device) == 24 * GIB
    (machine / "memory.swap.max").write_text("0\n")
    assert memory.memory_limit(Device) == 16 * GIB
    (machine / "memory.swap.max").write_text("max\n")
    assert memory.memory_limit(Device) == 24 * GIB
    # A device's own limit is its own.
    Device.memory_stats = staticmethod(lambda: {"bytes_limit": 3 * GIB})
    assert memory.memory_limit(Device) == 3 * GIB
