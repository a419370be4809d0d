"""Training of the demo's transformer: that a step of it works, and ends in an official checkpoint."""

from dataclasses import replace

import jax
import numpy as np
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from convert.checkpoint import Checkpoint
from convert.loader import flat_parameters, load_parameters
from jaxspd.demo import train
from jaxspd.models.flux1 import Flux1Transformer

SMALL = replace(
    train.CONFIG, num_layers=1, num_single_layers=2, attention_head_dim=8, axes_dims_rope=(2, 2, 4)
)


def test_a_step_is_made_and_written_officially(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CONFIG", SMALL)
    draw = np.random.default_rng(0)
    for name, shape in (("latents", (20, 16, 8, 8)), ("t5", (3, 5, 128)), ("clip", (3, 128))):
        np.save(tmp_path / f"{name}.npy", draw.standard_normal(shape, np.float32))
    np.save(tmp_path / "caption_index.npy", draw.integers(0, 3, 20))
    # A second, which compiling uses up.
    train.train(tmp_path, tmp_path / "made", minutes=1 / 60, peak_rate=1e-2, seed=3)

    abstract = nnx.eval_shape(lambda: nnx.state(Flux1Transformer(SMALL, rngs=nnx.Rngs(3))))
    trained = load_parameters(Checkpoint(tmp_path / "made" / "transformer"), abstract, train.RULES)
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(trained))
    # Blocks start as the identity and the output at zero, where the gradient is first.
    found = flat_parameters(trained)
    assert np.abs(found["out.weight"]).max() > 0
    assert np.abs(found["double_blocks.image_modulation.linear.weight"][0]).max() < 1e-3


def test_muon_takes_the_blocks_matrices_but_modulations():
    state = nnx.eval_shape(lambda: nnx.state(Flux1Transformer(SMALL, rngs=nnx.Rngs(0))))
    found = flat_parameters(train.muon_axes(state))
    for path, value in flat_parameters(state).items():
        matrix = "blocks." in path and "weight" in path and "modulation" not in path
        wanted = MuonDimensionNumbers(reduction_axis=1, output_axis=0) if matrix else None
        assert found[path] == ((wanted,) * len(value) if isinstance(value, tuple) else wanted), path
