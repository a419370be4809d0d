"""`dit_cpu_offload`: layers in host memory, streamed to the device one ahead of use."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspd import DiffGenerator
from jaxspd.convert.loader import flat_parameters
from jaxspd.convert.orbax_store import load_transformer
from jaxspd.convert.pipeline_folder import convert_pipeline
from jaxspd.errors import UsageError
from jaxspd.families import open_family
from jaxspd.runtime.layerwise import HOST, Layerwise
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
    velocity, abstract = family.velocity_function(jnp.float32), family.abstract_parameters(jnp.float32)
    return Layerwise(velocity, abstract, *inputs), inputs


def memories(parameters):
    """Where each parameter lies, by path."""
    return {path: array.sharding.memory_kind for path, array in flat_parameters(parameters).items()}


def test_streamed_layers_predict_the_same(folder):
    predictions = []
    for family in both(folder):
        program, inputs = program_of(family)
        predictions.append(np.asarray(program(parameters_of(family), *inputs)))
    np.testing.assert_array_equal(*predictions)


def test_layers_lie_in_host_memory_and_nothing_else(folder):
    resident, streamed = both(folder)
    assert set(memories(parameters_of(resident)).values()) == {"device"}
    layers = {path for path in memories(parameters_of(streamed)) if "blocks." in path}
    found = memories(parameters_of(streamed))
    assert found == {path: HOST if path in layers else "device" for path in found}
    assert 0 < len(layers) < len(found)


def test_a_converted_checkpoint_is_streamed_from_host_memory_too(flux1_folder, tmp_path):
    convert_pipeline(open_family(flux1_folder), tmp_path / "converted")
    _, streamed = both(flux1_folder)
    converted = parameters_of(replace(streamed, folder=tmp_path / "converted"))
    official = parameters_of(streamed)
    assert memories(converted) == memories(official)
    jax.tree.map(np.testing.assert_array_equal, converted, official)


def test_the_device_holds_two_layers_at_most(tmp_path, monkeypatch):
    folder = tiny.write_flux1(tmp_path / "deep", num_layers=1, num_single_layers=12)
    _, streamed = both(folder)
    parameters, (program, inputs) = parameters_of(streamed), program_of(streamed)
    double, single = (
        sum(array.nbytes for array in jax.tree.leaves(parameters[name])) // layers
        for name, layers in (("double_blocks", 1), ("single_blocks", 12))
    )
    before, held, put = on_device(), [], jax.device_put

    def spy(*args):
        array = put(*args)
        held.append(on_device() - before)
        return array

    monkeypatch.setattr(jax, "device_put", spy)
    program(parameters, *inputs)
    activations = 10 * inputs[0].nbytes
    assert 2 * single < max(held) < max(double + single, 2 * single) + activations
    assert max(held) < 4 * single


def on_device() -> int:
    """Bytes that JAX holds there."""
    return sum(array.nbytes for array in jax.live_arrays() if array.sharding.memory_kind == "device")


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
    monkeypatch.setattr("jaxspd.components.denoiser.HOST", "elsewhere")
    with pytest.raises(UsageError, match="leave dit_cpu_offload out"):
        DiffGenerator.from_pretrained(model_path=str(flux1_folder), dit_cpu_offload=True)
