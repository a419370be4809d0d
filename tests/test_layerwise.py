"""Functions compiled layer by layer: what they return, how many programs there are, what stays in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspd.models import layers
from jaxspd.models.layers import layer
from jaxspd.runtime import layerwise
from jaxspd.runtime.layerwise import Layerwise

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
        self.first = nnx.List(Block(rngs=rngs) for _ in range(first))
        self.second = nnx.List(Block(rngs=rngs) for _ in range(second))

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
