"""Functions compiled layer by layer: what they return, how many programs there are, what stays in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspd.models import layers
from jaxspd.models.layers import run, stack
from jaxspd.runtime import layerwise
from jaxspd.runtime.layerwise import HOST, Layerwise

WIDTH = 64
X = np.random.default_rng(0).standard_normal((3, WIDTH), np.float32)


class Block(nnx.Module):
    """A layer that reads a constant, a value and nothing."""

    def __init__(self, *, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, shift, constant, nothing):
        assert nothing is None
        return x + jnp.tanh(self.linear(x) * constant) + shift


class Model(nnx.Module):
    """Two rows of layers with something before, between and after them."""

    def __init__(self, first: int, second: int):
        rngs = nnx.Rngs(0)
        self.first = stack(lambda r: Block(rngs=r), first, rngs)
        self.second = stack(lambda r: Block(rngs=r), second, rngs)

    def __call__(self, x, shift):
        constant = np.linspace(0, 1, WIDTH, dtype=np.float32)
        x = run(self.first, 2 * x, shift, constant, None)
        x = run(self.second, x.astype(jnp.float32) - 1, shift, 1 - constant, None)
        return {"x": x, "half": x / 2, "shift": shift, "one": 1.0}


def model_of(first: int, second: int):
    graph, parameters = nnx.split(Model(first, second))
    return lambda parameters, x, shift: nnx.merge(graph, parameters)(x, shift), parameters


@pytest.mark.parametrize("depth", [(3, 2), (0, 2), (1, 0), (0, 0)], ids=str)
def test_the_result_is_the_functions(depth):
    function, parameters = model_of(*depth)
    arguments = parameters, X, np.float32(0.1)
    ours = Layerwise(function, *arguments)(*arguments)
    theirs = jax.jit(function)(*arguments)
    assert ours.keys() == theirs.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), ours, theirs)


def test_every_layer_has_weights_of_its_own():
    function, parameters = model_of(2, 0)
    (kernels, _) = (parameters["first"]["linear"][name].get_value() for name in ("kernel", "bias"))
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1
    program = Layerwise(function, parameters, X, np.float32(0))
    turned = jax.tree.map(lambda p: p, parameters)
    turned["first"]["linear"]["kernel"].set_value(kernels[::-1])
    one, other = (program(p, X, np.float32(0))["x"] for p in (parameters, turned))
    assert np.abs(one - other).max() > 1e-3


def test_layers_are_known_by_their_name():
    assert layerwise.LAYER == layers.LAYER


def test_layers_alike_share_a_program(compiled):
    counts = []
    for depth in ((2, 2), (7, 5)):
        function, parameters = model_of(*depth)
        compiled.clear()
        Layerwise(function, parameters, X, np.float32(0))
        counts.append(len(compiled))
    # Two kinds of layers, and what comes before, between and after them.
    assert counts == [5, 5]


def test_a_call_compiles_nothing(compiled):
    function, parameters = model_of(2, 2)
    program = Layerwise(function, parameters, X, np.float32(0))
    program(parameters, X, np.float32(0))
    compiled.clear()
    program(parameters, 2 * X, np.float32(1))
    assert compiled == []


def test_nothing_is_held_once_it_is_read():
    function, parameters = model_of(8, 0)
    program = Layerwise(function, parameters, X, np.float32(0))
    before = {id(array) for array in jax.live_arrays()}
    results = program(parameters, X, np.float32(0))
    left = [array for array in jax.live_arrays() if id(array) not in before]
    assert len(left) <= len(results)
    # Neither does the account of it grow with depth, but for the weights.
    weights = [sum(p.nbytes for p in jax.tree.leaves(model_of(n, 0)[1])) for n in (2, 8)]
    peaks = [Layerwise(*model_of(n, 0), X, np.float32(0)).peak_bytes for n in (2, 8)]
    assert peaks[1] - peaks[0] == weights[1] - weights[0]
    assert peaks[0] > weights[0] + 2 * X.nbytes


def test_streamed_weights_come_and_go():
    function, resident = model_of(8, 0)
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=HOST)
    streamed = jax.device_put(resident, host)
    weights = sum(p.nbytes for p in jax.tree.leaves(resident))
    results, peaks = [], []
    for parameters in (resident, streamed):
        program = Layerwise(function, parameters, X, np.float32(0))
        results.append(program(parameters, X, np.float32(0))["x"])
        peaks.append(program.peak_bytes)
    np.testing.assert_array_equal(*results)
    # Of eight layers two are there at once.
    assert 0 <= peaks[0] - peaks[1] - weights * 6 / 8 <= 2 * X.nbytes
