"""The notebook, run from top to bottom in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"


def test_the_notebook_runs_and_plots_what_it_explains(tmp_path):
    """With the cache of compiled programs that the tests share: others run the demo too."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    # Of the last figure, two pictures: not one colour, and alike but not the same.
    checks = """
assert len(plt.get_fignums()) == 5
left, right = (axis.images[0].get_array().astype(float) for axis in axes)
assert left.std() > 20
assert 0 < np.abs(left - right).mean() < 20
"""
    environment = os.environ | {
        "MPLBACKEND": "Agg",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*code, checks])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "times fewer FLOPs" in done.stdout
