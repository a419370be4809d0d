"""Weights of every family load where PyTorch and what builds on it are not to be had."""

import subprocess
import sys

import pytest
from machine import environment

LOAD = """
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "diffusers", "accelerate", "transformers"}:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)


sys.meta_path.insert(0, Blocked())

from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

from jaxspd.convert.orbax_store import load_transformer
from jaxspd.families import open_family

folder = Path(sys.argv[1])
family = open_family(folder)
parameters = load_transformer(folder, family.abstract_parameters(np.float32), family.rules)
ours = [np.asarray(array).ravel() for array in jax.tree.leaves(parameters)]
files = (folder / "transformer").glob("*.safetensors")
theirs = [array.ravel() for file in files for array in load_file(file).values()]
np.testing.assert_array_equal(np.sort(np.concatenate(ours)), np.sort(np.concatenate(theirs)))
print(sum(array.size for array in ours))
"""


@pytest.mark.parametrize("name", ["flux1", "klein", "wan", "z_image", "qwen_image"])
def test_a_transformer_loads_without_pytorch(name, request):
    folder = request.getfixturevalue(f"{name}_folder")
    env = environment() | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", LOAD, folder], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000


CONVERT = """
import sys
from importlib import import_module
from pathlib import Path

import jaxspd.convert

for file in Path(jaxspd.convert.__path__[0]).glob("*.py"):
    import_module(f"jaxspd.convert.{file.stem}".removesuffix(".__init__"))
print(*({"torch", "diffusers", "accelerate", "transformers"} & sys.modules.keys()), "none")
"""


def test_no_module_of_convert_imports_pytorch():
    told = subprocess.check_output([sys.executable, "-c", CONVERT], env=environment(), text=True)
    assert told.split() == ["none"]
