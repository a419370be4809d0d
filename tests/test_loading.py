"""What a load keeps in memory, and that it changes nothing on the way."""

import json
import subprocess
import sys

import loading
import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import write_random
from diffusers import FluxTransformer2DModel
from machine import environment

from jaxspd.convert.copying import copy, empty

TYPES = {np.float32: torch.float32, np.float16: torch.float16, ml_dtypes.bfloat16: torch.bfloat16}
# Values between two neighbours in each type, ties among them, and what does not fit.
HARD = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, -0.0, 1e-8, 65520, 3e38, np.inf], np.float32)


@pytest.mark.parametrize("stored", TYPES)
@pytest.mark.parametrize("wanted", TYPES)
def test_copies_round_to_nearest_even(stored, wanted):
    with np.errstate(over="ignore"):
        source = np.stack([HARD, -HARD, HARD[::-1]]).astype(stored)
        expected = source.astype(wanted)
    for turned in (source, source.T, source[:, 2:]):
        target = empty(turned.shape, wanted)
        copy(target, turned)
        want = {source.shape: expected, source.T.shape: expected.T}.get(turned.shape, expected[:, 2:])
        np.testing.assert_array_equal(target.view(np.uint8), np.ascontiguousarray(want).view(np.uint8))


def test_empty_arrays_are_aligned_for_jax():
    assert all(empty((n, 3), ml_dtypes.bfloat16).ctypes.data % 64 == 0 for n in (1, 1000, 10**6))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory from /proc")
@pytest.mark.parametrize("target", ["bfloat16", "float32"])
def test_a_load_holds_the_weights_and_little_else(target, tmp_path):
    """Mapped files included: had they stayed in memory, they would have taken another 90 MB."""
    options = {
        "num_layers": 1,
        "num_single_layers": 12,
        "num_attention_heads": 8,
        "attention_head_dim": 64,
        "axes_dims_rope": (16, 24, 24),
    }
    write_random(tmp_path / "transformer", FluxTransformer2DModel, options, torch.bfloat16, "20MB", 0)
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 3
    measured = subprocess.check_output(
        [sys.executable, loading.__file__, "--work", tmp_path, "--one", tmp_path, "bfloat16", target],
        env=environment() | {"JAX_PLATFORMS": "cpu"},
    )
    found = json.loads(measured)
    weights = found["weights, GB"] * 1e9
    assert weights > 80e6
    assert found["peak / weights"] * weights <= 1.15 * weights + 40e6
