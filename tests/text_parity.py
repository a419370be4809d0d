"""Both sides of a comparison of text encoders: transformers' own, and ours from the folder that transformers
wrote.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from jaxspd.convert import text_clip, text_decoder, text_t5
from jaxspd.convert.checkpoint import Checkpoint
from jaxspd.convert.loader import load_parameters
from jaxspd.convert.text_names import Renamed
from jaxspd.models.text.clip import ClipTextConfig, ClipTextModel
from jaxspd.models.text.decoder import Decoder, resolve
from jaxspd.models.text.decoder_config import DecoderConfig
from jaxspd.models.text.t5 import T5Config, T5Encoder
from jaxspd.runtime.layerwise import LAYER
from tests.compare import relative
from tests.tiny.common import randomise

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


def write(model, folder: Path, seed: int = 0, dtype=torch.float32) -> Path:
    """Writes `model` with random parameters to a folder."""
    randomise(model, seed)
    model.to(dtype).save_pretrained(folder)
    return folder


def reopen(model_class, folder: Path, dtype=torch.float32):
    """The reference, read back from `folder`."""
    return model_class.from_pretrained(folder, torch_dtype=dtype).eval()


def clip(folder: Path):
    """How to build CLIP's text model from `folder`, the names of its tensors, and its table."""
    return partial(ClipTextModel, ClipTextConfig.from_folder(folder)), text_clip.names, text_clip.RULES


def t5(folder: Path):
    """The same for T5's or UMT5's encoder."""
    return partial(T5Encoder, T5Config.from_folder(folder)), text_t5.names, text_t5.RULES


def decoder(folder: Path, states=(-1,)):
    """The same for a decoder-only model from which the hidden `states` are read."""
    config = DecoderConfig.from_folder(folder)
    layers = config.num_hidden_layers
    names = partial(text_decoder.names, built=max(resolve(states, layers)), layers=layers)
    return partial(Decoder, config, states), names, text_decoder.RULES


def split(make, dtype=jnp.float32):
    """The graph and the abstract parameters of a model."""
    return nnx.split(make(dtype=dtype))


def ours(opened, folder: Path, dtype=jnp.float32):
    """Our model as a compiled function, with the weights in `folder`."""
    make, names, rules = opened
    graph, state = split(make, dtype)
    parameters = load_parameters(Renamed(Checkpoint(folder, "model"), names), state, rules)
    call = jax.jit(lambda p, *inputs: nnx.merge(graph, p)(*inputs))
    return lambda *inputs: call(parameters, *inputs)


def layer_programs(make, ids) -> tuple[int, int]:
    """The number of layers that a model of `make` runs, and the number of their programs."""
    graph, state = split(make)
    jaxpr = jax.make_jaxpr(lambda p: nnx.merge(graph, p)(ids, np.ones_like(ids)))(state)
    layers = [e.params["jaxpr"].jaxpr for e in jaxpr.jaxpr.eqns if e.params.get("name") == LAYER]
    return len(layers), len({id(layer) for layer in layers})


def random_ids(vocabulary: int, lengths, tokens: int, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Token ids `[B, T]` and the mask of texts of `lengths` tokens, padded on the right or the left."""
    ids = np.random.default_rng(len(lengths)).integers(4, vocabulary, (len(lengths), tokens))
    mask = np.arange(tokens) < np.array(lengths)[:, None]
    return ids, (mask[:, ::-1] if left else mask).astype(np.int64)


def numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()


def assert_equal(states, reference: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Asserts that each text's states agree, relative to the reference's largest value."""
    theirs = numpy(reference)
    assert states.shape == theirs.shape
    for one, expected in zip(np.asarray(states), theirs, strict=True):
        assert np.abs(one - expected).max() <= tolerance * np.abs(expected).max()


def assert_as_near(states, reference: torch.Tensor, half: torch.Tensor) -> None:
    """Asserts that `states` in bfloat16 are as near to the `reference` in float32 as PyTorch's `half` is."""
    error, allowed = (relative(each, numpy(reference)) for each in (states.astype(jnp.float32), numpy(half)))
    assert 1e-4 < error <= 1.2 * allowed
