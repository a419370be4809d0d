"""Both sides of a comparison of text encoders: transformers' own, and ours from the folder that it wrote."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jaxspd.convert.checkpoint import Checkpoint
from jaxspd.convert.loader import load_parameters
from jaxspd.convert.text_names import Renamed

from tests.tiny.common import randomise


def write(model, folder: Path, seed: int = 0, dtype=torch.float32) -> Path:
    """A folder with `model`, whose parameters are drawn anew."""
    randomise(model, seed)
    model.to(dtype).save_pretrained(folder)
    return folder


def flax_encoder(make, folder: Path, names, rules, dtype=jnp.float32):
    """Our model as a compiled function, its weights from `folder`; `make(dtype, rngs)` builds it and `names`
    finds what it reads.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: make(dtype=dtype, rngs=nnx.Rngs(0))))
    parameters = load_parameters(Renamed(Checkpoint(folder, "model"), names), state, rules)
    call = jax.jit(lambda p, *inputs: nnx.merge(graph, p)(*inputs))
    return lambda *inputs: call(parameters, *inputs)


def reopen(model_class, folder: Path, dtype=torch.float32):
    """The reference, read back from `folder`."""
    return model_class.from_pretrained(folder, torch_dtype=dtype).eval()


def ids_and_mask(vocabulary: int, lengths, tokens: int, left: bool = False, seed: int = 0):
    """Random token ids and the mask `[B, T]` of texts of `lengths`, padded on the right or the left."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, (len(lengths), tokens))
    mask = np.arange(tokens) < np.array(lengths)[:, None]
    return ids, (mask[:, ::-1] if left else mask).astype(np.int64)


def largest(ours, theirs) -> float:
    """The largest difference, by the largest value of the reference; every text by itself, so that none hides
    behind another.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    axes = tuple(range(1, theirs.ndim))
    return float((np.abs(ours - theirs).max(axes) / np.abs(theirs).max(axes)).max())


def numpy(tensor) -> np.ndarray:
    return tensor.detach().float().numpy()
