"""Tensors and rows of safetensors files as their own memory, in every dtype."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from machine import environment
from safetensors.torch import save_file

from jaxspd.convert.checkpoint import DTYPES, STEM, Checkpoint
from jaxspd.convert.text_names import Renamed
from jaxspd.errors import UsageError

TORCH = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    save_file(tensors, folder / f"{STEM}.safetensors")
    return Checkpoint(folder)


def write_raw(folder: Path, header: bytes, data: bytes) -> None:
    content = len(header).to_bytes(8, "little") + header + data
    (folder / f"{STEM}.safetensors").write_bytes(content)


@pytest.mark.parametrize("name", DTYPES)
def test_tensors_of_every_dtype_are_read_as_they_are_stored(name, tmp_path):
    # Small whole numbers, which every dtype holds.
    values = torch.arange(15).reshape(3, 5)
    tensors = {
        "matrix": values.to(TORCH[name]),
        "scalar": torch.tensor(7).to(TORCH[name]),
        "none": torch.zeros(0, 4).to(TORCH[name]),
        "other": torch.ones(2, dtype=torch.uint8),
    }
    checkpoint = write(tmp_path, tensors)
    assert checkpoint.dtype("matrix") == name
    for key, tensor in tensors.items():
        array = checkpoint.read(key)
        assert type(array) is np.ndarray
        assert array.shape == tuple(tensor.shape)
        assert array.dtype == DTYPES[checkpoint.dtype(key)]
        assert array.tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        np.testing.assert_array_equal(array.astype(np.float32), tensor.float().numpy())


def test_what_is_read_cannot_be_written_to(tmp_path):
    array = write(tmp_path, {"a": torch.zeros(3)}).read("a")
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_tensors_may_begin_at_any_byte(tmp_path):
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [3, 7]},
    }
    values = np.array([1.5, -2], ml_dtypes.bfloat16)
    write_raw(tmp_path, json.dumps(header).encode(), b"\1\2\3" + values.tobytes())
    np.testing.assert_array_equal(Checkpoint(tmp_path).read("b"), values)


def test_a_dtype_that_cannot_be_read_is_named(tmp_path):
    checkpoint = write(tmp_path, {"a": torch.zeros(3, dtype=torch.complex64)})
    with pytest.raises(UsageError, match=r"stores a as C64; .* F32, F16, BF16"):
        checkpoint.read("a")


def test_a_file_cut_or_gone_after_its_header_was_read_is_refused(tmp_path):
    checkpoint = write(tmp_path, {"a": torch.zeros(1000)})
    file = tmp_path / f"{STEM}.safetensors"
    cut = file.read_bytes()[:-1]
    for spoil in (lambda: file.write_bytes(cut), lambda: file.write_bytes(b""), file.unlink):
        spoil()
        with pytest.raises(UsageError, match=file.name):
            checkpoint.read("a")
        with pytest.raises(UsageError, match=file.name):
            checkpoint.rows("a", np.array([0, 999]))


@pytest.mark.parametrize(
    "entries",
    [
        {"a": [0, 8], "b": [4, 12]},
        {"a": [0, 8], "b": [12, 20]},
        {"a": [0, 8], "b": [8, 20]},
        {"a": [4, 12]},
        {"a": [0, 8], "b": [8, 16]},
    ],
    ids=["overlap", "hole", "too long for its shape", "late", "past the end"],
)
def test_offsets_that_contradict_the_file_are_refused(entries, tmp_path):
    header = {key: {"dtype": "F32", "shape": [2], "data_offsets": span} for key, span in entries.items()}
    write_raw(tmp_path, json.dumps(header).encode(), bytes(12))
    with pytest.raises(UsageError, match="truncated or no safetensors file"):
        Checkpoint(tmp_path)


# Rows


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_rows_are_those_of_the_whole(dtype, tmp_path):
    table = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).to(TORCH[dtype])
    checkpoint = write(tmp_path, {"before": torch.zeros(3), "table": table})
    renamed = Renamed(checkpoint, lambda keys: {"tokens": "table"})
    for indices in (np.array([7, 0, 49, 7]), np.array([[1, 2], [3, 4], [49, 48]]), np.zeros(0, np.int64)):
        expected = table[torch.from_numpy(indices)].float().numpy()
        for rows in (checkpoint.rows("table", indices), renamed.rows("tokens", indices)):
            assert rows.shape == (*indices.shape, 6)
            assert rows.dtype == DTYPES[dtype]
            np.testing.assert_array_equal(rows.astype(np.float32), expected)
    for beyond in (-1, 50):
        with pytest.raises(IndexError, match="table has rows 0 to 49"):
            checkpoint.rows("table", np.array([[3, beyond]]))


READ_ROWS = """
import sys
from pathlib import Path
import numpy as np
from loading import resident
from jaxspd.convert.checkpoint import Checkpoint

checkpoint = Checkpoint(Path(sys.argv[1]))
before = resident("VmRSS")
rows = checkpoint.rows("table", np.arange(0, 64_000, 1000))
print(resident("VmHWM") - before, float(rows.astype(np.float32).sum()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory from /proc")
def test_rows_leave_the_rest_of_the_table_alone(tmp_path):
    table = torch.ones(64_000, 1024, dtype=torch.bfloat16)  # 131 MB, of which the rows are 0.1
    write(tmp_path, {"table": table})
    env = environment()
    env["PYTHONPATH"] += ":bench"
    told = subprocess.check_output([sys.executable, "-c", READ_ROWS, tmp_path], env=env, text=True).split()
    assert float(told[1]) == 64 * 1024
    assert int(told[0]) < 16e6
