"""Loading one side of a comparison: our transformer from a folder in the official layout."""

import jax
import jax.numpy as jnp
from flax import nnx

from convert.checkpoint import Checkpoint
from convert.loader import load_parameters
from jaxspd.families.base import read_transformer_config


def flax_transformer(model_class, config_class, rules, pipeline, dtype=jnp.float32):
    """`(config, call)`: our transformer of the pipeline's `transformer` folder as a compiled function."""
    config = read_transformer_config(pipeline, config_class)
    abstract = nnx.eval_shape(lambda: model_class(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    parameters = load_parameters(Checkpoint(pipeline / "transformer"), state, rules)
    call = jax.jit(lambda p, *inputs: nnx.merge(graph, p)(*inputs))
    return config, lambda *inputs: call(parameters, *inputs)
