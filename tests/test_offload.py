"""`dit_cpu_offload`: layers in host memory, streamed to the device one ahead of use."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.loader import flat_parameters
from convert.orbax_store import convert_pipeline, load_transformer
from jaxspd import DiffGenerator
from jaxspd.errors import UsageError
from jaxspd.families import open_family
from jaxspd.families.base import HOST
from tests import tiny

FOLDERS = ["flux1_folder", "klein_folder", "wan_folder", "z_image_folder", "qwen_image_folder"]


@pytest.fixture(params=FOLDERS)
def folder(request):
    return request.getfixturevalue(request.param)


def both(folder):
    """The family with its weights on the device, and with its layers streamed."""
    family = open_family(folder)
    return family, replace(family, streamed=True)


def parameters_of(family):
    return load_transformer(family.folder, family.abstract_parameters(jnp.float32), family.rules)


def program_of(family):
    """The compiled denoiser, and inputs for it after the parameters."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal(
        (1, *family.leading(family.frames_per_latent + 1 if family.default_fps else 1), 8, 12)
    )
    conditioning = {
        name: np.full(a.shape, 7, a.dtype)
        if a.dtype == jnp.int32
        else rng.standard_normal(a.shape).astype(a.dtype)
        for name, a in family.abstract_conditioning(1).items()
    }
    inputs = latents.astype(np.float32), np.float32(0.7), conditioning
    velocity = jax.jit(family.velocity_function(jnp.float32))
    return velocity.lower(family.abstract_parameters(jnp.float32), *inputs).compile(), inputs


def memories(parameters):
    """Where each parameter lies, by path."""
    return {path: value.sharding.memory_kind for path, value in flat_parameters(parameters).items()}


def layers(family):
    return {rule.path for rule in family.rules if rule.stacked}


def test_streamed_layers_predict_the_same(folder):
    predictions = []
    for family in both(folder):
        program, inputs = program_of(family)
        predictions.append(np.asarray(program(parameters_of(family), *inputs)))
    np.testing.assert_array_equal(*predictions)


def test_layers_lie_in_host_memory_and_nothing_else(folder):
    resident, streamed = both(folder)
    assert set(memories(parameters_of(resident)).values()) == {"device"}
    found = memories(parameters_of(streamed))
    assert {path for path, kind in found.items() if kind == HOST} == layers(streamed) & set(found)
    assert set(found.values()) == {"device", HOST}
    # The program takes them from there.
    program, _ = program_of(streamed)
    expected = flat_parameters(program.input_shardings[0][0])
    assert {path: sharding.memory_kind for path, sharding in expected.items()} == found


def test_a_converted_checkpoint_is_streamed_from_host_memory_too(flux1_folder, tmp_path):
    convert_pipeline(open_family(flux1_folder), tmp_path / "converted")
    _, streamed = both(flux1_folder)
    converted = parameters_of(replace(streamed, folder=tmp_path / "converted"))
    official = parameters_of(streamed)
    assert memories(converted) == memories(official)
    jax.tree.map(np.testing.assert_array_equal, converted, official)


def test_the_device_holds_a_layer_or_two(tmp_path):
    folder = tiny.write_flux1(tmp_path / "deep", num_layers=1, num_single_layers=24)
    resident, streamed = both(folder)
    stacked = sum(
        p.nbytes
        for path, p in flat_parameters(parameters_of(streamed)).items()
        if path.startswith("single_blocks")
    )
    extra = [program_of(family)[0].memory_analysis().temp_size_in_bytes for family in (resident, streamed)]
    assert 0 < extra[1] - extra[0] <= 4 * stacked / 24


def test_offload_compiles_nothing_twice(flux1_folder, compiled):
    generator = DiffGenerator.from_pretrained(model_path=str(flux1_folder), dit_cpu_offload=True)
    request = {"prompt": "a lake", "height": 64, "width": 96, "num_inference_steps": 4}
    first = generator.generate(request, save_output=False, show_progress=False)
    assert first.programs == 1
    compiled.clear()
    second = generator.generate(request | {"prompt": "a hill"}, save_output=False, show_progress=False)
    assert compiled == []
    assert (first.frames[0] != second.frames[0]).any()


def test_a_backend_without_host_memory_is_told(flux1_folder, monkeypatch):
    monkeypatch.setattr("jaxspd.generator.HOST", "elsewhere")
    with pytest.raises(UsageError, match="leave dit_cpu_offload out"):
        DiffGenerator.from_pretrained(model_path=str(flux1_folder), dit_cpu_offload=True)
