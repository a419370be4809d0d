"""Functions compiled layer by layer: what they return, how many programs there are, what stays in memory."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspd.models import layers
from jaxspd.models.layers import abstract, layer, stack
from jaxspd.runtime import layerwise
from jaxspd.runtime.layerwise import HOST, Layerwise

WIDTH = 64
X = np.random.default_rng(0).standard_normal((3, WIDTH), np.float32)


class Block(nnx.Module):
    """A layer that reads values, a table and nothing."""

    def __init__(self, *, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, shift, table, nothing):
        assert nothing is None
        return x + jnp.tanh(self.linear(x) * table) + shift


class Model(nnx.Module):
    """Two rows of layers with something before, between and after them."""

    def __init__(self, first: int, second: int):
        rngs = nnx.Rngs(0)
        self.first = stack(lambda r: Block(rngs=r), first, rngs)
        self.second = stack(lambda r: Block(rngs=r), second, rngs)

    def __call__(self, x, shift):
        table = np.linspace(0, 1, WIDTH, dtype=np.float32)
        x = 2 * x
        for block in self.first:
            x = layer(block, x, shift, table, None)
        x = x.astype(jnp.float32) - 1
        for block in self.second:
            x = layer(block, x, shift, 1 - table, None)
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
    kernels = [parameters["first"][number]["linear"]["kernel"].get_value() for number in range(2)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1
    program = Layerwise(function, parameters, X, np.float32(0))
    turned = jax.tree.map(lambda p: p, parameters)
    for number in range(2):
        turned["first"][number]["linear"]["kernel"].set_value(kernels[1 - number])
    one, other = (program(p, X, np.float32(0))["x"] for p in (parameters, turned))
    assert np.abs(one - other).max() > 1e-3


def test_layers_are_known_by_their_name():
    assert layers.transformer_layer.__name__ == layerwise.LAYER


def test_layers_alike_share_a_program(compiled):
    counts = []
    for depth in ((2, 2), (7, 5)):
        function, parameters = model_of(*depth)
        compiled.clear()
        Layerwise(function, parameters, X, np.float32(0))
        counts.append(len(compiled))
    # One kind of layer, and what comes before, between and after them.
    assert counts == [4, 4]


@pytest.fixture
def forgetful(monkeypatch):
    """JAX, tracing every layer anew."""

    def traced_anew(graph, parameters, *arguments):
        def transformer_layer(parameters, *arguments):
            return nnx.merge(graph, parameters)(*arguments)

        return jax.jit(transformer_layer)(parameters, *arguments)

    monkeypatch.setattr(layers, "transformer_layer", traced_anew)


def test_layers_that_only_read_alike_share_a_program_too(forgetful, compiled):
    function, parameters = model_of(3, 2)
    equations = jax.make_jaxpr(function)(parameters, X, np.float32(0)).eqns
    traced = {id(e.params["jaxpr"].jaxpr) for e in equations if e.params.get("name") == layerwise.LAYER}
    assert len(traced) == 5
    compiled.clear()
    Layerwise(function, parameters, X, np.float32(0))
    assert len(compiled) == 4


class Scaled(nnx.Module):
    """A layer that knows a number of its own."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return x * self.factor


def test_layers_that_differ_do_not_share_a_program():
    blocks = [Scaled(factor) for factor in (2.0, 3.0, 2.0)]

    def function(x):
        for block in blocks:
            x = layer(block, x)
        return x

    np.testing.assert_allclose(Layerwise(function, X)(X), 12 * X, rtol=1e-6)


def test_modules_made_at_once_are_those_made_one_by_one():
    made = stack(lambda r: Block(rngs=r), 3, nnx.Rngs(0))
    graphs = {nnx.split(block)[0] for block in made}
    assert graphs == {nnx.split(Block(rngs=nnx.Rngs(1)))[0]}
    assert len(stack(lambda r: Block(rngs=r), 0, nnx.Rngs(0))) == 0


def test_an_abstract_model_is_flaxs_own():
    make = lambda: Model(2, 1)  # noqa: E731
    (graph, state), (own_graph, own_state) = (nnx.split(of(make)) for of in (nnx.eval_shape, abstract))
    assert graph == own_graph
    assert jax.tree.structure(state) == jax.tree.structure(own_state)
    assert [(p.shape, p.dtype) for p in jax.tree.leaves(state)] == [
        (p.shape, p.dtype) for p in jax.tree.leaves(own_state)
    ]


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


# What lies elsewhere


class Stored:
    """A weight that is read when its turn comes."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = np.asarray(array), array.shape, array.dtype

    def fetch(self):
        return jnp.asarray(self.array)


def held() -> int:
    """How many weights of layers are on the device."""
    return sum(array.shape == (WIDTH, WIDTH) for array in jax.live_arrays())


def on_host(parameters):
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=HOST)
    return jax.device_put(parameters, host)


def stored(parameters):
    return jax.tree.map(Stored, parameters)


@pytest.mark.parametrize("away", [on_host, stored])
def test_streamed_weights_come_and_go(away):
    function, resident = model_of(8, 0)
    streamed = away(resident)
    weights = sum(p.nbytes for p in jax.tree.leaves(resident))
    results, peaks = [], []
    for parameters in (resident, streamed):
        program = Layerwise(function, parameters, X, np.float32(0))
        results.append(program(parameters, X, np.float32(0))["x"])
        peaks.append(program.peak_bytes)
    np.testing.assert_array_equal(*results)
    # Of eight layers two are there at once.
    assert 0 <= peaks[0] - peaks[1] - weights * 6 / 8 <= 2 * X.nbytes


@pytest.mark.parametrize("away", [on_host, stored])
def test_where_weights_lie_is_asked_at_each_call(away, compiled):
    function, resident = model_of(3, 2)
    program = Layerwise(function, resident, X, np.float32(1))
    expected = program(resident, X, np.float32(1))
    streamed = away(resident)
    compiled.clear()
    for parameters in (streamed, resident):
        jax.tree.map(np.testing.assert_array_equal, program(parameters, X, np.float32(1)), expected)
    assert compiled == []
    # What is given back as it came, too.
    shift = away(jnp.float32(1))
    jax.tree.map(np.testing.assert_array_equal, program(streamed, X, shift), expected)


def test_weights_are_read_in_the_background_two_layers_at_most(monkeypatch):
    function, resident = model_of(6, 0)
    parameters = stored(resident)
    del resident
    program = Layerwise(function, parameters, X, np.float32(0))
    kept, reads = held(), []

    def fetch(self):
        array = jnp.asarray(self.array)
        reads.append((self, threading.current_thread(), held() - kept))
        return array

    monkeypatch.setattr(Stored, "fetch", fetch)
    for _ in range(2):
        reads.clear()
        program(parameters, X, np.float32(0))
        assert [one for one, *_ in reads if one.shape == (WIDTH, WIDTH)] == [
            parameters["first"][number]["linear"]["kernel"].get_value() for number in range(6)
        ]
        assert threading.main_thread() not in {thread for _, thread, _ in reads}
        assert max(count for *_, count in reads) == 2
        assert held() == kept


def test_what_fails_to_be_read_says_so():
    function, resident = model_of(3, 0)
    parameters = stored(resident)
    program = Layerwise(function, parameters, X, np.float32(0))
    broken = parameters["first"][2]["linear"]["bias"].get_value()
    broken.fetch = lambda: (_ for _ in ()).throw(OSError("the disk is gone"))
    with pytest.raises(OSError, match="the disk is gone"):
        program(parameters, X, np.float32(0))
