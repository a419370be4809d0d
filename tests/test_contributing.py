"""CONTRIBUTING.md, followed once: a family of our own, from a folder to a picture."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxspd import families
from jaxspd.cli import main
from tests import toy

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_toy_makes_pictures(toy_folder, tmp_path, capsys):
    grow = ["--progressive-mode", "dct_rewind", "--progressive-delta", "0.05"]
    flags = ["--model-path", str(toy_folder), *grow]
    for prompt in ("a lake", "a meadow"):
        out = ["--output-path", str(tmp_path), "--output-file-name", f"{prompt[2:]}.png"]
        assert main(["generate", "--prompt", prompt, "--negative-prompt", "haze", *flags, *out]) == 0
    lake, meadow = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("lake", "meadow"))
    assert lake.shape == (32, 48, 3)
    assert (lake != meadow).any()
    assert main(["plan", *flags]) == 0
    assert "Toy, dct_rewind, 1 level" in capsys.readouterr().out


def test_the_table_names_what_a_family_has():
    table = [line for line in TEXT.splitlines() if line.startswith("| `")]
    named = {name for line in table for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    base = {"tokens", "velocity_function", "abstract_transformer", "abstract_parameters"}
    own = {name for name in vars(toy.Family) if not name.startswith("_")} | set(toy.Family.__annotations__)
    assert named == own
    optional = {name for name in vars(families.base.BaseFamily) if not name.startswith("_")} - base - own
    assert all(f"`{name}`" in TEXT for name in optional)


@pytest.mark.parametrize("name", sorted(set(families.PIPELINES.values())))
def test_every_family_is_where_the_steps_put_it(name):
    root = Path(__file__).parents[1]
    for place in ("tests/tiny", "torch_ref", "jaxspd/models", "convert", "jaxspd/families"):
        assert (root / place / f"{name}.py").is_file()
    assert f"`{name}`" not in TEXT
    missing = {
        member
        for line in TEXT.splitlines()
        if line.startswith("| `")
        for member in re.findall(r"`(\w+)`", line.split("|")[1])
        if not hasattr(families.family_class(name)(), member)
    }
    assert not missing
