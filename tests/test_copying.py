"""Conversion between float types, with PyTorch as the judge, and memory that JAX takes over."""

import sys
import threading

import jax
import ml_dtypes
import numpy as np
import pytest
import torch

from jaxspd.convert.copying import copy, empty

TYPES = {
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float16): torch.float16,
    np.dtype(ml_dtypes.bfloat16): torch.bfloat16,
}


def bits(array):
    return array.view(np.uint32 if array.dtype.itemsize == 4 else np.uint16)


def every_half(dtype):
    """All 65,536 values of a type of 16 bits: subnormals, infinities and every NaN among them."""
    return np.arange(1 << 16, dtype=np.uint16).view(dtype)


def many_floats():
    """Random bits, and for every number of both half types itself, its ties, and what lies beside these."""
    random = np.random.default_rng(0)
    offsets = np.array([-1, 0, 1], np.int64)
    near = [random.integers(0, 1 << 32, 1 << 20)]
    # The bits by which float32 is longer than the type, and with them the distance to a tie.
    for dtype, longer in ((ml_dtypes.bfloat16, 16), (np.float16, 13)):
        exact = bits(every_half(dtype).astype(np.float32)).astype(np.int64)
        for tie in (0, 1 << (longer - 1)):
            near.append((exact[:, None] + tie + offsets).ravel())
    # Float16's subnormals lie evenly, float32's here do not.
    tiny = np.arange(2049) * 2.0**-25
    near += [bits(np.nextafter(tiny, side).astype(np.float32)).astype(np.int64) for side in (-1, tiny, 1)]
    # And float32's own subnormals.
    near.append(random.integers(0, 1 << 23, 1 << 16))
    return np.concatenate(near).astype(np.uint32).view(np.float32)


def as_torch(array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@pytest.fixture(scope="module")
def sources():
    """Of the half types several times every value, for more than are converted at once."""
    return {d: many_floats() if d == np.float32 else np.tile(every_half(d), 5) for d in TYPES}


@pytest.mark.parametrize("wanted", TYPES, ids=str)
@pytest.mark.parametrize("stored", TYPES, ids=str)
@pytest.mark.filterwarnings("error")
def test_every_value_becomes_what_pytorch_makes_of_it(sources, stored, wanted):
    source = sources[stored]
    target = empty(source.shape, wanted)
    copy(target, source)
    judge = as_torch(source.copy()).to(TYPES[wanted])
    theirs = bits(empty(source.shape, wanted))
    as_torch(theirs.view(wanted)).copy_(judge)
    # A NaN has many bit patterns, of which PyTorch itself chooses by the processor.
    nan = torch.isnan(as_torch(source.copy())).numpy()
    assert 0 < nan.sum() < len(nan) / 8
    np.testing.assert_array_equal(bits(target)[~nan], theirs[~nan])
    assert np.isnan(target[nan].astype(np.float32)).all()
    np.testing.assert_array_equal(np.signbit(target[nan]), np.signbit(source[nan]))
    if stored == wanted:
        np.testing.assert_array_equal(bits(target), bits(source))


@pytest.mark.parametrize("stored", TYPES, ids=str)
@pytest.mark.parametrize("wanted", TYPES, ids=str)
def test_sources_that_begin_at_any_byte_are_copied(stored, wanted):
    values = np.linspace(-3, 3, 1001, dtype=np.float32).astype(stored)
    odd = np.frombuffer(b"\0" + values.tobytes(), stored, offset=1)
    assert not odd.flags.aligned
    target = empty(values.shape, wanted)
    copy(target, odd)
    np.testing.assert_array_equal(target, values.astype(wanted))


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (3, 5), (1000, 1001)])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_jax_takes_empty_arrays_over(shape, dtype):
    array = empty(shape, dtype)
    assert (array.shape, array.dtype) == (shape, dtype)
    if array.size:
        held = jax.device_put(array, jax.devices("cpu")[0])
        assert held.unsafe_buffer_pointer() == array.ctypes.data


@pytest.mark.parametrize("stored", TYPES, ids=str)
@pytest.mark.parametrize("wanted", TYPES, ids=str)
def test_other_threads_run_while_arrays_are_copied(stored, wanted):
    """A thread that waits for the interpreter gets it only from a copy that lets go of it."""
    source = np.ones(1 << 22, np.float32).astype(stored)
    target = empty(source.shape, wanted)
    begin, ran = threading.Event(), []
    thread = threading.Thread(target=lambda: (begin.wait(), ran.append(True)))
    interval = sys.getswitchinterval()
    thread.start()
    # Python itself makes nobody let go for this long.
    sys.setswitchinterval(1000)
    try:
        begin.set()
        for _ in range(200):
            copy(target, source)
            if ran:
                break
    finally:
        sys.setswitchinterval(interval)
    assert ran
    thread.join()
