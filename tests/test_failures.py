"""Failures as people see them: exit codes, the line, the place in the code, and streams that nobody reads."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxspd import cli
from jaxspd.errors import UsageError
from jaxspd.runtime.memory import memory_for
from jaxspd.sampling import programs

SMALL = ["--prompt", "a lake", "--height", "32", "--width", "32", "--num-inference-steps", "1"]


def fail(error):
    def run(*_, **__):
        raise error

    return run


def command(*flags, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **options.pop("env", {})}
    return subprocess.run([sys.executable, "-m", "jaxspd", *flags], env=environment, **options)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            ValueError("no such\nthing"),
            1,
            "ValueError: no such thing (a fault of jaxspd; --traceback shows where)",
        ),
        (AssertionError(), 1, "AssertionError (a fault of jaxspd; --traceback shows where)"),
        (MemoryError(), 2, "this takes more memory than there is; ask for less, in size or in number"),
        (PermissionError(13, "Permission denied", "/a/b"), 2, "/a/b: Permission denied"),
        (UsageError("say more"), 2, "say more"),
    ],
)
@pytest.mark.parametrize(
    "flags", [["plan"], ["plan", "--traceback"], ["--traceback", "plan"]], ids=["", "after", "before"]
)
def test_a_failure_is_one_line_and_a_code(monkeypatch, capsys, error, code, line, flags):
    monkeypatch.setattr(cli.plan, "run", fail(error))
    assert cli.main(flags) == code
    *place, last = capsys.readouterr().err.splitlines()
    assert last == f"jaxspd: {line}"
    assert bool(place) == ("--traceback" in flags)
    assert not place or any("in run" in said for said in place)


def test_help_tells_of_the_traceback(capsys):
    for flags in (["--help"], ["calibrate", "--help"]):
        with pytest.raises(SystemExit):
            cli.main(flags)
        assert "--traceback" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 12.5 PiB"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 70368744177664 bytes."),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_want_of_memory_is_told_with_what_took_it(error):
    with pytest.raises(UsageError) as told, memory_for("decoding 8×8 pixels"):
        raise error
    assert str(told.value).startswith("decoding 8×8 pixels takes more memory than there is (")
    assert "smaller height and width" in str(told.value)


def test_what_the_libraries_raise_for_want_of_memory_is_known():
    import jax.numpy as jnp
    import torch

    for take in (
        lambda: np.zeros((2**22, 2**22, 100)),
        lambda: jnp.zeros((2**22, 2**22)).block_until_ready(),
        lambda: torch.zeros(2**22, 2**22),
    ):
        with pytest.raises(UsageError, match="a table takes more memory"), memory_for("a table"):
            take()


def test_other_errors_are_not_taken_for_want_of_memory():
    with pytest.raises(RuntimeError, match="shapes differ"), memory_for("a table"):
        raise RuntimeError("shapes differ")


def test_a_picture_too_large_for_the_machine_is_refused(refused, flux1_folder, monkeypatch):
    monkeypatch.setattr(programs, "memory_limit", lambda device: 1000)
    line = refused(*SMALL[2:], "--compilation-cache", "false", model=flux1_folder)
    assert "a step on the latent grid 4×4 takes" in line


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_that_is_not_there_is_named(flux1_folder, tmp_path, platform):
    flags = ["--model-path", str(flux1_folder), "--output-path", str(tmp_path / "out"), *SMALL]
    done = command("generate", *flags, env={"JAX_PLATFORMS": platform}, text=True)
    if platform == "cuda" and done.returncode == 0:
        pytest.skip("there is a GPU")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert f"JAX_PLATFORMS, which is {platform}" in line
    assert not (tmp_path / "out").exists()


def closed_pipe() -> int:
    """The end to write to of a pipe that nobody reads."""
    unread, end = os.pipe()
    os.close(unread)
    return end


def test_a_picture_is_written_though_nobody_reads_what_is_said_of_it(flux1_folder, tmp_path):
    """Neither the report nor the progress bar."""
    end = closed_pipe()
    flags = ["--model-path", str(flux1_folder), "--output-path", str(tmp_path), *SMALL]
    done = command("generate", *flags, "--output-file-name", "a", stdout=end, stderr=end)
    os.close(end)
    assert done.returncode == 0
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (32, 32)


STREAMS = """
import sys
from jaxspd import cli
def say(args):
    print("8×8 · σ", *"many " * 100000)
    print("σ", file=sys.stderr)
cli.plan.run = say
sys.exit(cli.main(["plan"]))
"""


def streams(stdout=subprocess.PIPE, stderr=subprocess.PIPE, **env):
    environment = {**os.environ, **env}
    return subprocess.run([sys.executable, "-c", STREAMS], stdout=stdout, stderr=stderr, env=environment)


def test_a_pipe_that_is_closed_early_is_no_error():
    end = closed_pipe()
    done = streams(stdout=end)
    os.close(end)
    assert (done.returncode, done.stderr.decode()) == (0, "σ\n")


def test_characters_that_a_stream_lacks_are_replaced():
    done = streams(PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout.startswith(b"8?8 ? ?")
    assert done.stderr == b"?\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_full_disk_under_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        done = streams(stdout=full)
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[-1] == "jaxspd: No space left on device"


def test_streams_closed_beforehand_are_no_error():
    command = ["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, STREAMS]
    assert subprocess.run(command).returncode == 0


FRACTION = """
import jax
from jax._src import xla_bridge
from jaxlib import xla_client
import jaxspd.generator
assert not xla_bridge.backends_are_initialized()
options = xla_client.generate_pjrt_gpu_plugin_options()
print(options["memory_fraction"], options["preallocate"])
"""


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        ({}, "0.9 False"),
        ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, "0.5 False"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.6", "XLA_PYTHON_CLIENT_PREALLOCATE": "true"}, "0.6 True"),
    ],
    ids=["nothing", "the share", "the share by its old name"],
)
def test_jax_may_take_most_of_a_gpu_unless_told_otherwise(own, wanted):
    """What JAX tells its CUDA plugin when the backend starts, though JAX was imported before."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("XLA_")}
    done = subprocess.run(
        [sys.executable, "-c", FRACTION], capture_output=True, text=True, env={**clean, **own}
    )
    assert done.stdout.strip() == wanted, done.stderr
