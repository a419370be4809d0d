"""Training of the demo: that its steps learn, go on where they stopped, and end in an official checkpoint."""

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from training import autoencoder, latents, transformer

from jaxspd.convert.checkpoint import Checkpoint
from jaxspd.convert.flux1 import RULES
from jaxspd.convert.loader import flat_parameters, match
from jaxspd.families.flux1 import Family
from jaxspd.models.flux1 import Flux1Config

SMALL = {
    **transformer.CONFIG,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 6,
    "pooled_projection_dim": 5,
    "axes_dims_rope": (2, 2, 4),
}


@pytest.fixture
def state(tmp_path, monkeypatch):
    """A folder with two shards of made-up latents, and trainers small enough for it."""
    monkeypatch.setattr(transformer, "CONFIG", SMALL)
    monkeypatch.setattr(transformer, "GRIDS", ((0, 4, 0.7, (0.5, 0.5)), (1, 4, 1.6, (0.5, 0.5))))
    monkeypatch.setattr(transformer, "SAVE_STEPS", 2)
    monkeypatch.setattr(transformer, "BEGINNING", tmp_path / "beginning")
    monkeypatch.setattr(transformer, "BEGUN", 3)
    monkeypatch.setattr(latents, "SHARD", 3)
    draw = np.random.default_rng(0)
    captions = ["", *sorted({latents.landscapes.describe(seed)[1] for seed in range(6)})]
    t5, clip = (draw.standard_normal((len(captions), *shape)) for shape in ((3, 6), (5,)))
    np.savez(tmp_path / "text.npz", captions=captions, t5=t5.astype(np.float16), clip=clip.astype(np.float16))
    (tmp_path / "latents").mkdir()
    for number in range(2):
        shard = draw.standard_normal((6, 16, 8, 8)).astype(np.float16)
        np.save(tmp_path / "latents" / f"{number:04d}.npy", shard)
    return tmp_path


def train(state, steps):
    training = transformer.Training(state)
    training.run(transformer.Data(state), steps, cooldown=0, peak_rate=1e-2)
    return training


def test_training_goes_on_to_the_bit_where_it_stopped(state):
    train(state, 2)
    resumed = train(state, 4).model.state_dict()
    (state / "transformer.pt").unlink()
    for name, whole in train(state, 4).model.state_dict().items():
        torch.testing.assert_close(resumed[name], whole, rtol=0, atol=0)


def test_it_begins_with_an_earlier_runs_average(state):
    average = train(state, 3).average
    (state / "transformer").rename(state / "beginning")
    (state / "transformer.pt").unlink()
    begun = transformer.Training(state)
    assert begun.step == 3
    for name, weight in begun.model.state_dict().items():
        torch.testing.assert_close(weight, average.state_dict()[name].half().float(), rtol=0, atol=0)
    assert train(state, 5).step == 5


def test_its_checkpoint_is_an_official_one(state):
    train(state, 2)
    abstract = Family(config=Flux1Config(**SMALL)).abstract_parameters(np.float32)
    assert match(Checkpoint(state / "transformer"), flat_parameters(abstract), RULES)


def test_the_transformer_learns(state):
    training, data = transformer.Training(state), transformer.Data(state)
    torch.manual_seed(0)
    losses = [training._step(data.batch(4, np.random.default_rng(i % 2)), 0, 0.7, 1e-2) for i in range(40)]
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:2])


def test_a_mirrored_drawing_keeps_its_caption(state):
    data = transformer.Data(state)
    row = data.row[latents.landscapes.describe(latents.shard_seeds(1)[2])[1]]
    assert data.captions[1][4:].tolist() == [row, row]


def test_muon_takes_the_blocks_matrices_but_modulations(state):
    model = transformer.build()
    muon, adam = transformer.optimisers(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    left = {names[id(p)] for group in adam.param_groups for p in group["params"]}
    assert taken | left == set(names.values())
    assert not taken & left
    assert "transformer_blocks.0.attn.to_q.weight" in taken
    assert "single_transformer_blocks.0.proj_out.weight" in taken
    assert {"transformer_blocks.0.norm1.linear.weight", "x_embedder.weight", "proj_out.weight"} <= left


def test_halving_keeps_low_frequencies():
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 2, 8, 8)).astype(np.float32))
    exact = dctn(x.numpy(), axes=(-2, -1), norm="ortho")[..., :4, :4] / 2
    halved = dctn(autoencoder.halve(x).numpy(), axes=(-2, -1), norm="ortho")
    np.testing.assert_allclose(halved, exact, atol=1e-5)


# What the autoencoder's losses see


def grass(seed=0):
    return torch.from_numpy(np.random.default_rng(seed).uniform(-0.5, 0.5, (2, 3, 64, 64)).astype(np.float32))


def test_the_texture_term_asks_for_power_not_for_pixels():
    rng, other = np.random.default_rng(0), grass(1)
    felt = torch.nn.functional.avg_pool2d(grass(), 3, stride=1, padding=1)
    same, blurred = (autoencoder.texture_loss(x, grass(), rng).item() for x in (grass(), felt))
    another = autoencoder.texture_loss(other, grass(), rng).item()
    assert same == 0
    assert 3 * another < blurred


def test_the_block_term_sees_blocks_and_nothing_else():
    blocky = grass().clone()
    blocky[:, :, :, ::8] += 0.4
    assert autoencoder.block_loss(grass(), grass()).item() == 0
    assert autoencoder.block_loss(0.5 * grass(), grass()).item() < 0.02
    assert autoencoder.block_loss(blocky, grass()).item() > 0.1


@pytest.mark.parametrize("adversarial", [False, True])
def test_a_step_of_the_autoencoder_moves_only_what_it_may(tmp_path, monkeypatch, adversarial):
    monkeypatch.setattr(autoencoder, "build", small_autoencoder)
    training = autoencoder.Training(tmp_path)
    for group in training.optimiser.param_groups:
        group["lr"] = 1e-3
    training.freeze_encoder()
    before = {name: value.clone() for name, value in training.vae.state_dict().items()}
    terms = training._step(grass(), np.random.default_rng(0), adversarial)
    assert all(np.isfinite(list(terms.values())))
    assert ("hinge" in terms) == adversarial
    for name, value in training.vae.state_dict().items():
        moved = not torch.equal(value, before[name])
        assert moved == name.startswith("decoder."), name
    training.save()
    assert autoencoder.Training(tmp_path).step == 1


def small_autoencoder(build=autoencoder.build):
    torch.manual_seed(0)
    return build(channels=(8, 8, 8, 8), groups=4)
