"""What becomes of freed memory while denoising."""

import platform
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxspd.sampling.memory import freed_memory_kept

ROOT = Path(__file__).parents[1]
SIZE = 64 * 2**20


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
    """Prints the pages asked for again while freed memory is kept, and after."""
    with freed_memory_kept():
        page_faults()
        print(page_faults())
    # Given back and asked for again; a system with huge pages provides them by the hundred.
    page_faults()
    print(page_faults())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_is_used_again():
    # In a process of its own, whose heap no other test has filled.
    code = "from tests.test_memory import measure; measure()"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    kept, returned = map(int, said.stdout.split())
    assert kept < SIZE // resource.getpagesize() / 1000 < returned
