"""Several processes that make the same outputs together: what one makes, with one voice, and one end."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxspd.cli import main
from tests.spread import environment

ROOT = Path(__file__).parents[1]
SIZE = ["--height", "96", "--width", "160"]
GROWING = ["--num-inference-steps", "3", "--progressive-mode", "dct_rewind", "--progressive-delta", "0.1"]
# Seconds in which processes have to end.
SOON = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(folder, *flags, devices=4):
    """A process with so many devices that works in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "jaxspd", "generate", "--compilation-cache", "false", *flags],
        cwd=folder,
        env=environment(devices) | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start(folders, *flags, devices=4):
    """One in each of `folders`, together."""
    flags += ("--dist-init-addr", f"127.0.0.1:{free_port()}", "--nnodes", str(len(folders)))
    flags += ("--num-gpus", str(devices * len(folders)), "--output-path", "out")
    return [
        run(folder, *flags, "--node-rank", str(rank), devices=devices) for rank, folder in enumerate(folders)
    ]


def ended(processes):
    """The code, the output and the lines on stderr, without the bar's, of each."""
    ends = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=SOON)
            lines = (line.strip() for line in err.splitlines() if "step" not in line)
            ends.append((process.returncode, out, [line for line in lines if line]))
    finally:
        for process in processes:
            process.kill()
    return ends


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_two_processes_make_what_one_device_makes(flux1_folder, tmp_path):
    """The first finds a file of prompts, and one of the pictures, where the other finds none."""
    folders, alone = [tmp_path / "first", tmp_path / "second"], tmp_path / "alone"
    prompts = folders[0] / "prompts.txt"
    prompts.parent.mkdir()
    prompts.write_text("a lake\na meadow\n")
    asked = ["--model-path", str(flux1_folder), *SIZE, *GROWING]
    assert main(["generate", *asked, "--prompt-path", str(prompts), "--output-path", str(alone)]) == 0
    [lake], [meadow] = alone.glob("a-lake*"), alone.glob("a-meadow*")
    (folders[0] / "out").mkdir()
    shutil.copy(lake, folders[0] / "out")
    listed = ["--prompt-path", "prompts.txt", "--skip-existing", "true"]
    first, second = ended(start(folders, *asked, *listed))
    assert first[0] == second[0] == 0, (first, second)
    # One speaks and writes.
    assert first[1].startswith(f"wrote out/{meadow.name}\n")
    assert "stage 2 (12×20)" in first[1]
    assert "outputs that existed already: 1" in first[1]
    assert first[2] == ["spread over 8 devices: tokens are shared among all"]
    assert second[1:] == ("", [])
    assert [*folders[1].iterdir()] == []
    ours, theirs = pixels(folders[0] / "out" / meadow.name), pixels(meadow)
    assert np.abs(ours - theirs).max() <= 1
    assert theirs.max() - theirs.min() > 100


def test_what_the_first_refuses_it_says_for_all(flux1_folder, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    flags = ["--model-path", str(flux1_folder), "--prompt", "a lake", "--ulysses-degree", "3"]
    first, second = ended(start(folders, *flags))
    assert first[:2] == (2, "")
    assert len(first[2]) == 1
    assert "--ulysses-degree 3 does not make use of --num-gpus 8" in first[2][0]
    assert second == (2, "", [])


@pytest.mark.parametrize(("killed", "count"), [(0, 2), (1, 3)], ids=["first", "another"])
def test_a_process_that_dies_ends_the_others(flux1_folder, tmp_path, killed, count):
    folders = [tmp_path / str(rank) for rank in range(count)]
    flags = ["--prompt", "a lake", "--num-inference-steps", "900", *SIZE]
    processes = start(folders, "--model-path", str(flux1_folder), *flags, devices=1)
    seen = ""
    while not re.search(r"\d/900", seen):
        part = os.read(processes[0].stderr.fileno(), 4096).decode(errors="replace")
        assert part, seen
        seen += part
    processes[killed].kill()
    ends = ended(processes)
    for rank, (code, out, lines) in enumerate(ends):
        if rank != killed:
            assert (code, out) == (1, "")
            assert lines == [f"jaxspd: process {killed} has ended, and the others with it"]
    assert not [*tmp_path.rglob("out/*")]


def test_who_meets_nobody_says_so(tmp_path):
    flags = ["--prompt", "a lake", "--dist-timeout", "2", "--nnodes", "2"]
    places = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    processes = [
        run(tmp_path, *flags, "--dist-init-addr", place, "--node-rank", str(rank))
        for rank, place in enumerate(places)
    ]
    *ends, end = ended([*processes, run(tmp_path, *flags)])
    assert end[:2] == (2, "")
    assert "give --dist-init-addr, --nnodes and --node-rank" in end[2][0]
    for who, place, end in zip(("all of 2 processes", "the first process"), places, ends, strict=True):
        line = f"jaxspd: cannot reach {who} at {place} within 2 seconds; start all at once, and check "
        assert end == (2, "", [line + "--dist-init-addr"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--nnodes", "0"], "--nnodes must be 1 or more, not 0"),
        (
            ["--nnodes", "2", "--node-rank", "2"],
            "--node-rank must be 0 or more and less than --nnodes, not 2",
        ),
        (["--node-rank", "0"], "--node-rank is of no use alone; give --nnodes too"),
        (["--nnodes", "2", "--dist-timeout", "0"], "--dist-timeout must be more than 0 and at most 3600"),
        (
            ["--dist-init-addr", "here"],
            "--dist-init-addr must be HOST:PORT, such as 10.0.0.1:25000, not here",
        ),
        (["--dist-init-addr", "here:0"], "not here:0"),
    ],
    ids=" ".join,
)
def test_what_names_no_processes_is_refused(refused, flags, said):
    assert said in refused(*flags)
