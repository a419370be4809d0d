"""`quantize`: the blocks' weights in 8 bits, rounded as they are read, and products of 8 bits."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxspd import DiffGenerator
from jaxspd.convert.loader import flat_parameters
from jaxspd.convert.orbax_store import check_transformer, load_transformer
from jaxspd.convert.pipeline_folder import convert_pipeline
from jaxspd.convert.rounding import round_rows
from jaxspd.families import family_class, open_family
from jaxspd.media.metadata import read_request
from jaxspd.models.quantized import DTYPES, QuantizedLinear
from jaxspd.runtime.layerwise import HOST
from tests.test_offload import FOLDERS, memories, parameters_of, program_of

LARGEST = {"int8": 127, "fp8": 448}
NUMPY = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}


@pytest.fixture(params=FOLDERS)
def folder(request):
    return request.getfixturevalue(request.param)


def weights_of(family):
    loaded = load_transformer(family.folder, family.abstract_parameters(jnp.float32), family.rules)
    return {path: np.asarray(array) for path, array in flat_parameters(loaded).items()}


def nearest(values, kind):
    """The nearest number of `kind`, found by looking at all 256 of them."""
    numbers = np.arange(256, dtype=np.uint8).view(NUMPY[kind]).astype(np.float64)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    return numbers[np.abs(values[..., None] - numbers).argmin(-1)]


@pytest.mark.parametrize("kind", DTYPES)
def test_each_row_is_rounded_to_the_nearest_in_its_own_unit(kind):
    weight = np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    weight *= 10.0 ** np.arange(-3, 3)[:, None]
    weight[2] = 0
    values, units = round_rows(weight, NUMPY[kind])
    exact = weight.astype(np.float64)
    expected = np.abs(exact).max(1) / LARGEST[kind]
    expected[2] = 1
    np.testing.assert_allclose(units, expected, rtol=1e-6)
    steps = np.abs(values.astype(np.float64) - exact / expected[:, None])
    best = np.abs(nearest(exact / expected[:, None], kind) - exact / expected[:, None])
    np.testing.assert_allclose(steps, best, atol=1e-4)  # of two as near, either


@pytest.mark.parametrize("kind", DTYPES)
def test_a_layer_is_the_product_of_what_both_were_rounded_to(kind):
    rng = np.random.default_rng(1)
    weight, bias = rng.standard_normal((24, 64)).astype(np.float32), rng.standard_normal(24)
    x = (rng.standard_normal((2, 5, 64)) * 10.0 ** rng.integers(-3, 4, (2, 5, 1))).astype(np.float32)
    x[0, 1] = 0
    layer = QuantizedLinear(64, 24, dtype=jnp.float32, weight_dtype=DTYPES[kind])
    values, units = round_rows(weight, NUMPY[kind])
    layer.weight.set_value(jnp.asarray(values))
    layer.weight_scale.set_value(jnp.asarray(units))
    layer.bias.set_value(jnp.asarray(bias, jnp.float32))
    token = np.abs(x.astype(np.float64)).max(-1, keepdims=True) / LARGEST[kind]
    token[token == 0] = 1
    rounded = nearest(x / token, kind) * token
    expected = rounded @ (values.astype(np.float64) * units[:, None].astype(np.float64)).T + bias
    found = np.asarray(jax.jit(lambda x: layer(x))(x))
    assert (np.abs(found - expected) <= 1e-5 * np.abs(expected).max(-1, keepdims=True)).all()
    # Far from what is not rounded, by no more than 8 bits lose.
    error = np.linalg.norm(found - x @ weight.T - bias) / np.linalg.norm(x @ weight.T)
    assert 1e-3 < error < (0.02 if kind == "int8" else 0.06)


def test_a_row_that_is_not_finite_stays_so():
    weight = np.ones((2, 3), np.float32)
    weight[0, 1] = np.nan
    _, units = round_rows(weight, np.int8)
    assert np.isnan(units[0])
    assert np.isfinite(units[1])


def test_blocks_are_rounded_and_edges_norms_and_modulation_are_not(folder):
    plain = open_family(folder)
    exact, rounded = weights_of(plain), weights_of(replace(plain, quantize="int8"))
    eight = {path for path, array in rounded.items() if array.dtype == np.int8}
    assert {path.removesuffix("_scale") for path in rounded if path.endswith("weight_scale")} == eight
    # Every matrix of a block but modulation's, and nothing else.
    assert eight == {
        path
        for path, array in exact.items()
        if array.ndim == 2 and any(part.isdigit() for part in path.split(".")) and "modulation" not in path
    }
    for path, array in exact.items():
        if path not in eight:
            np.testing.assert_array_equal(rounded[path], array)
            continue
        values, units = round_rows(array, np.int8)
        np.testing.assert_array_equal(rounded[path], values)
        np.testing.assert_array_equal(rounded[f"{path}_scale"], units)


def test_a_forward_is_near_what_is_not_rounded_and_the_same_streamed(klein_folder):
    plain = open_family(klein_folder)
    rounded = replace(plain, quantize="int8")
    velocities = []
    for family in (plain, rounded, replace(rounded, streamed=True)):
        program, inputs = program_of(family)
        velocities.append(np.asarray(program(parameters_of(family), *inputs)))
        if family.streamed:
            places = memories(parameters_of(family))
            assert places["single_blocks.0.out.weight"] == places["single_blocks.0.out.weight_scale"] == HOST
    exact, found, streamed = velocities
    np.testing.assert_array_equal(streamed, found)
    assert 1e-3 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.05


def test_converted_weights_are_rounded_alike(klein_folder, tmp_path):
    convert_pipeline(open_family(klein_folder), tmp_path / "orbax")
    family = replace(open_family(tmp_path / "orbax"), quantize="int8")
    check_transformer(family.folder, family.abstract_parameters(jnp.float32), family.rules)
    converted = weights_of(family)
    for path, array in weights_of(replace(family, folder=klein_folder)).items():
        np.testing.assert_array_equal(converted[path], array)


def test_a_file_says_that_it_was_quantised_and_is_repeated_so(klein_folder, tmp_path):
    request = {"prompt": "a lake", "height": 64, "width": 64, "num_inference_steps": 1}
    generator = DiffGenerator.from_pretrained(klein_folder, compilation_cache=False, quantize="fp8")
    result = generator.generate({**request, "output_path": str(tmp_path)}, show_progress=False)
    assert read_request(result.paths[0])["quantize"] == "fp8"


def test_another_kind_is_refused(refused):
    assert "unknown quantize 'int4'; use int8 or fp8" in refused("--quantize", "int4")


@pytest.mark.parametrize("name", ["flux1", "flux2", "wan", "z_image", "qwen_image"])
def test_a_published_model_takes_a_byte_for_each_weight_of_its_blocks(name):
    family = family_class(name)()

    def size(family):
        return sum(
            p.size * p.dtype.itemsize for p in jax.tree.leaves(family.abstract_parameters(jnp.bfloat16))
        )

    # Modulation stays: a quarter of FLUX.1 and a third of Qwen-Image.
    bounds = {"flux1": (0.6, 0.7), "qwen_image": (0.6, 0.7)}.get(name, (0.5, 0.6))
    assert bounds[0] < size(replace(family, quantize="int8")) / size(family) < bounds[1]
