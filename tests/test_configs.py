"""Configuration files with anything in them: a folder opens, or one line refuses it; never a traceback."""

import json
import random
import shutil

import jax.numpy as jnp
import pytest

from jaxspd.convert.orbax_store import check_transformer
from jaxspd.errors import UsageError
from jaxspd.families import open_family
from jaxspd.planning import plan_request
from jaxspd.request import SamplingParams
from tests.components import components
from tests.tiny import change_json

FAMILIES = [
    "flux1_folder",
    "klein_folder",
    "flux2_dev_folder",
    "qwen_image_folder",
    "wan_folder",
    "z_image_folder",
]
VALUES = [None, "x", -1, 0, [3], [], {}, True, 1e30, float("nan"), 10**12]
# Of how many fields of large files each wrong value is tried.
MOST = 12


def opened(folder, part):
    """All that is checked before anything is computed, as far as `part` is in it."""
    family = open_family(folder)
    frames = 5 if family.default_fps else None
    plan_request(family, SamplingParams(height=64, width=64, num_frames=frames))
    if part == "transformer":
        check_transformer(folder, family.abstract_parameters(jnp.float32), family.rules)
    if part in (*family.weights, "tokenizer"):
        components(family).check()
    return family


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["", "scheduler", "vae", "transformer", "text_encoder", "tokenizer"])
def test_a_wrong_value_is_refused_or_harmless(request, tmp_path, family, part):
    folder = shutil.copytree(request.getfixturevalue(family), tmp_path / "model")
    (path,) = (
        path
        for path in (folder / part).glob("*.json")
        if path.name in ("model_index.json", "config.json", "scheduler_config.json", "tokenizer_config.json")
    )
    text = path.read_text()
    cases = [(name, value) for name in json.loads(text) for value in VALUES]
    # Always the same ones, and others for each file.
    draw = random.Random(f"{family} {part}")
    lines = []
    for name, value in draw.sample(cases, min(len(cases), MOST)):
        change_json(path, **{name: value})
        try:
            opened(folder, part)
        except UsageError as error:
            lines.append(str(error))
        except Exception as error:
            raise AssertionError(f"{path.name}: {name} = {value!r}") from error
        path.write_text(text)
    assert opened(folder, part)
    assert all(len(line.splitlines()) == 1 for line in lines)
    assert lines or part not in ("scheduler", "vae", "transformer")


@pytest.mark.parametrize(
    ("family", "file", "values", "says"),
    [
        ("flux1_folder", "vae/config.json", {"scaling_factor": 0}, "scaling_factor must be a number above 0"),
        (
            "flux1_folder",
            "vae/config.json",
            {"scaling_factor": None},
            "scaling_factor must be a finite number",
        ),
        (
            "flux1_folder",
            "vae/config.json",
            {"shift_factor": "a"},
            "shift_factor must be a finite number or null",
        ),
        (
            "flux1_folder",
            "vae/config.json",
            {"block_out_channels": 4},
            "a list of values, each a whole number",
        ),
        ("flux1_folder", "transformer/config.json", {"num_layers": "2"}, "num_layers must be a whole number"),
        (
            "flux1_folder",
            "transformer/config.json",
            {"num_layers": 10**9},
            "num_layers must be a whole number",
        ),
        ("flux1_folder", "transformer/config.json", {"axes_dims_rope": [4, 6, 4]}, "heads of 16 channels"),
        (
            "flux1_folder",
            "scheduler/scheduler_config.json",
            {"shift": -1.0},
            "shift must be a number above 0",
        ),
        (
            "flux1_folder",
            "scheduler/scheduler_config.json",
            {"max_shift": None},
            "max_shift must be a finite",
        ),
        ("flux1_folder", "scheduler/scheduler_config.json", {"max_shift": 1e20}, "noise levels do not fall"),
        ("flux1_folder", "scheduler/scheduler_config.json", {"_class_name": [1]}, "_class_name must be text"),
        (
            "flux1_folder",
            "scheduler/scheduler_config.json",
            {"_class_name": "DDIM"},
            "names DDIM; jaxspd has",
        ),
        (
            "flux1_folder",
            "tokenizer_2/tokenizer_config.json",
            {"model_max_length": 0},
            "must be 1 or more, not 0",
        ),
        ("flux1_folder", "model_index.json", {"_class_name": ["FluxPipeline"]}, "pipeline; jaxspd runs"),
        ("klein_folder", "vae/config.json", {"patch_size": [1, 1]}, "patch_size must be"),
        (
            "klein_folder",
            "transformer/config.json",
            {"rope_theta": -1.0},
            "rope_theta must be a number above 0",
        ),
        (
            "wan_folder",
            "vae/config.json",
            {"latents_mean": [0.0] * 3},
            "latents_mean must be a list of z_dim, 4",
        ),
        (
            "wan_folder",
            "vae/config.json",
            {"latents_std": [1.0, 1.0, 0.0, 1.0]},
            "latents_std must be a list of",
        ),
        ("wan_folder", "vae/config.json", {"latents_std": None}, "latents_std must be a list of"),
        ("wan_folder", "transformer/config.json", {"patch_size": [1, 2]}, "a list of 3 values"),
        ("qwen_image_folder", "vae/config.json", {"latents_mean": "x"}, "latents_mean must be a list of"),
        ("z_image_folder", "transformer/config.json", {"n_heads": 5}, "n_heads must be a divisor of dim, 48"),
    ],
)
def test_the_line_says_what_is_wrong(refused, request, tmp_path, family, file, values, says):
    folder = shutil.copytree(request.getfixturevalue(family), tmp_path / "model")
    change_json(folder / file, **values)
    flags = ["--num-frames", "5"] if family == "wan_folder" else []
    assert says in refused("--height", "64", "--width", "64", *flags, model=folder)


@pytest.mark.parametrize(("given", "tokens"), [(10**30, 512), (1e30, 512), (None, 512), (7, 7)])
def test_the_length_of_text_that_a_tokenizer_allows(request, tmp_path, given, tokens):
    folder = shutil.copytree(request.getfixturevalue("wan_folder"), tmp_path / "model")
    change_json(folder / "tokenizer" / "tokenizer_config.json", model_max_length=given)
    assert open_family(folder).text_tokens == tokens


def test_a_configuration_nested_without_end(refused, request, tmp_path):
    folder = shutil.copytree(request.getfixturevalue("flux1_folder"), tmp_path / "model")
    (folder / "vae" / "config.json").write_text("[" * 100_000)
    assert "no valid JSON" in refused(model=folder)
