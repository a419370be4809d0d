"""The wheel as people install it: what is in it, what it says of itself, and that it works alone."""

import email
import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import jaxspd
from jaxspd.yaml_core import parse_yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = f"jaxspd-{jaxspd.__version__}"
# Of the repository, what an installed jaxspd is made from.
SOURCES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "jaxspd", "convert")


def sources() -> set[str]:
    """The files of `SOURCES`, without what running them leaves behind."""
    found = [file for name in SOURCES for file in ((ROOT / name), *(ROOT / name).rglob("*"))]
    return {str(file.relative_to(ROOT)) for file in found if file.is_file() and file.suffix != ".pyc"}


def build(kind: str, source: Path, into: Path) -> Path:
    """The sdist or the wheel of `source`, by the hook that pip calls, in a process of its own. Pip would
    first fetch setuptools into an empty environment; here it is the one that is installed.
    """
    code = f"from setuptools.build_meta import *; print(build_{kind}({str(into)!r}))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return into / ran.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Built of a copy, beside which lie folders that are none of its business."""
    copy = tmp_path_factory.mktemp("copy")
    for name in sorted(sources()):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("tests", "bench", "torch_ref", "docs"):
        (copy / folder).mkdir()
        (copy / folder / "test_of_jaxspd.py").write_text("")
    return build("sdist", copy, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built of the sdist, as it is where there is no wheel for a platform."""
    source = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    return build("wheel", source / NAME, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def room(wheel, tmp_path_factory) -> Path:
    """An environment that has the wheel, and of this one only the folders of dependencies: no module of the
    repository, which is on this one's path.
    """
    place = tmp_path_factory.mktemp("room")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    pip = [sys.executable, "-m", "pip", "--python", place / "bin" / "python", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True)
    [packages] = place.glob("lib/python*/site-packages")
    dependencies = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(dependencies))
    return place


def run(room: Path, folder: Path, *command: str) -> str:
    """What `command` of the room prints, run in `folder`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder)}
    program = [room / "bin" / command[0], *command[1:]]
    ran = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_citation_is_of_this_version():
    citation = parse_yaml((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == jaxspd.__version__
    assert citation["license"] == PROJECT["license"]


def test_the_sdist_holds_what_is_installed_and_nothing_else(sdist):
    with tarfile.open(sdist) as archive:
        files = {member.name.removeprefix(f"{NAME}/") for member in archive if member.isfile()}
    ours = {name for name in files if ".egg-info/" not in name} - {"PKG-INFO", "setup.cfg"}
    assert ours == sources()


def test_the_wheel_holds_every_file_of_jaxspd_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    code = {f"jaxspd/{name}" if name.startswith("convert/") else name for name in sources() if "/" in name}
    assert {name for name in files if not name.startswith(f"{NAME}.dist-info/")} == code
    for needed in (
        "demo/checkpoint/model_index.json",
        "speed.json",
        "server/page/main.js",
        "convert/table.py",
    ):
        assert f"jaxspd/{needed}" in files
    assert not [
        name for name in files if {"tests", "bench", "torch_ref", "training", "docs"} & {*Path(name).parts}
    ]


def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        said = email.message_from_bytes(archive.read(f"{NAME}.dist-info/METADATA"))
        licence = archive.read(f"{NAME}.dist-info/licenses/LICENSE")
    assert (said["Name"], said["Version"], said["License-Expression"]) == (
        "jaxspd",
        jaxspd.__version__,
        "Apache-2.0",
    )
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert said["Summary"] == PROJECT["description"]
    assert said["Description-Content-Type"] == "text/markdown"
    assert said.get_payload(decode=True).strip() == (ROOT / "README.md").read_bytes().strip()
    assert said["Requires-Python"] == PROJECT["requires-python"]
    needed = [one for one in said.get_all("Requires-Dist") if "extra ==" not in one]
    assert len(needed) == len(PROJECT["dependencies"])
    assert {*said.get_all("Provides-Extra")} == {*PROJECT["optional-dependencies"]}


def test_what_is_installed_draws_a_picture_by_itself(room, tmp_path):
    where = "import jaxspd, jaxspd.convert.table as c; print(jaxspd.__file__, c.__file__, sep='\\n')"
    for file in run(room, tmp_path, "python", "-c", where).splitlines():
        assert Path(file).is_relative_to(room)
    assert run(room, tmp_path, "jaxspd", "--version") == f"jaxspd {jaxspd.__version__}\n"
    small = ["--num-inference-steps", "3", "--height", "64", "--width", "64", "--output-path", "made"]
    grown = ["--progressive-mode", "dct_rewind", "--progressive-delta", "0.1"]
    report = run(room, tmp_path, "jaxspd", "generate", "--prompt", "a lake", *small, *grown, "--json")
    assert len(json.loads(report)["plan"]["stages"]) == 2
    [picture] = (tmp_path / "made").iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")
