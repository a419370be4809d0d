"""What is installed: every package of ours, and nothing by a name that others use."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    inside = {path.parent.relative_to(ROOT) for path in (ROOT / "jaxspd").rglob("*.py")}
    found = {".".join(folder.parts) for folder in inside} | {"jaxspd.convert"}
    assert sorted(listed) == sorted(found)


def test_a_users_own_convert_is_left_alone(tmp_path):
    (tmp_path / "convert.py").write_text("raise SystemExit('the wrong convert')\n")
    (tmp_path / "torch_ref.py").write_text("raise SystemExit('the wrong torch_ref')\n")
    ran = subprocess.run(
        [sys.executable, "-m", "jaxspd", "plan", "--json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert '"family": "flux1"' in ran.stdout


def test_convert_knows_nothing_of_the_rest():
    for path in (ROOT / "convert").rglob("*.py"):
        assert "import jaxspd" not in path.read_text(), path
        assert "from jaxspd" not in path.read_text(), path


def test_what_runs_programs_knows_no_model():
    for path in (ROOT / "jaxspd" / "runtime").rglob("*.py"):
        for package in ("models", "families", "convert"):
            assert f"jaxspd.{package}" not in path.read_text(), path


def test_models_know_nothing_of_what_runs_them():
    for path in (ROOT / "jaxspd" / "models").rglob("*.py"):
        for package in ("families", "runtime", "sampling"):
            assert f"import jaxspd.{package}" not in path.read_text(), path
            assert f"from jaxspd.{package}" not in path.read_text(), path
