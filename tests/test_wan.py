"""Wan's transformer beside diffusers' own, in float32 on tiny checkpoints."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from jaxspd.convert.checkpoint import Checkpoint, write_component
from jaxspd.convert.loader import flat_parameters, load_parameters
from jaxspd.convert.orbax_store import load_transformer
from jaxspd.convert.pipeline_folder import convert_pipeline
from jaxspd.convert.wan import RULES
from jaxspd.families import open_family
from jaxspd.models.wan import WanConfig, WanTransformer
from tests import tiny
from tests.compare import relative
from tests.parity import assert_matters, flax_transformer

TEXT_TOKENS = 10
# Frames, height and width of latents; every patch size below divides them.
SHAPES = [(3, 4, 6), (1, 8, 2)]


class Pair:
    """Our transformer and diffusers' from one pipeline folder, called with the same arrays."""

    def __init__(self, pipeline):
        self.theirs = WanTransformer3DModel.from_pretrained(pipeline / "transformer")
        self.config, self.ours = flax_transformer(WanTransformer, WanConfig, RULES, pipeline)

    def inputs(self, shape, batch=2, seed=0):
        """Elements that differ in latents, time and text; the second one's text ends early, in zeros."""
        draw = np.random.default_rng(seed)
        latents = draw.standard_normal((batch, self.config.in_channels, *shape), dtype=np.float32)
        text = draw.standard_normal((batch, TEXT_TOKENS, self.config.text_dim), dtype=np.float32)
        text[1:, 4:] = 0
        return [latents, text, np.linspace(999, 127, batch, dtype=np.float32)]

    @torch.no_grad()
    def official(self, latents, text, time):
        latents, text, time = map(torch.from_numpy, (latents, text, time))
        return self.theirs(latents, time, text).sample.numpy()


@pytest.fixture(scope="module")
def pair(wan_folder):
    return Pair(wan_folder)


@pytest.mark.parametrize("shape", SHAPES)
def test_velocity_is_diffusers(pair, shape):
    inputs = pair.inputs(shape)
    ours = pair.ours(*inputs)
    chex.assert_shape(ours, inputs[0].shape)
    assert ours.dtype == jnp.float32
    for element, reference in zip(ours, pair.official(*inputs), strict=True):
        assert relative(element, reference) <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"cross_attn_norm": False},
        {"patch_size": (3, 1, 2)},
        # 6 + 2 * 4 channels of a head turn with time, row and column.
        {"attention_head_dim": 14, "num_attention_heads": 2},
        {"out_channels": None, "eps": 1e-2},
    ],
    ids=["no cross norm", "patches in time", "uneven rope axes", "wide epsilon"],
)
def test_any_configuration_of_the_official_class(tmp_path, options):
    tiny.wan_transformer(num_layers=1, seed=4, **options).save_pretrained(tmp_path / "transformer")
    pair = Pair(tmp_path)
    for name, value in options.items():
        assert getattr(pair.config, name) == value
    inputs = pair.inputs(SHAPES[0])
    assert relative(pair.ours(*inputs), pair.official(*inputs)) <= 1e-5


# Parity is worth nothing where an input is ignored on both sides, or hardly matters.
@pytest.mark.parametrize("position", [0, 1, 2], ids=["latents", "text", "time"])
def test_every_input_matters_to_its_own_batch_element_only(pair, position):
    assert_matters(pair.ours, pair.inputs(SHAPES[0]), position)


def test_frames_rows_and_columns_are_told_apart(pair):
    """Each axis reversed gives something else than the reversed result: position matters on each."""
    latents, text, time = pair.inputs((3, 6, 6))
    velocity = np.asarray(pair.ours(latents, text, time))
    for axis in (2, 3, 4):
        flipped = np.asarray(pair.ours(np.flip(latents, axis).copy(), text, time))
        assert relative(np.flip(flipped, axis), velocity) > 1e-2


def test_modulation_and_time_embedding_stay_in_float32(tmp_path):
    tiny.write_wan(tmp_path, dtype=torch.bfloat16)
    family = open_family(tmp_path)
    abstract = family.abstract_parameters(jnp.bfloat16)
    loaded = flat_parameters(load_parameters(Checkpoint(tmp_path / "transformer"), abstract, RULES))
    fine = {path for path, value in loaded.items() if value.dtype == jnp.float32}
    kept = ("modulation", "time_in", "cross_norm", "bias")
    assert fine == {path for path in loaded if any(name in path for name in kept)}
    assert all(loaded[path].dtype == jnp.bfloat16 for path in loaded.keys() - fine)
    # And the stored values are there in full, those of float32 included.
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "transformer", torch_dtype=torch.bfloat16)
    table = theirs.blocks[1].scale_shift_table
    assert table.dtype == torch.float32
    np.testing.assert_array_equal(loaded["blocks.1.modulation.vectors"], table.detach().numpy())


def test_bfloat16_is_as_close_to_float32_as_diffusers_is(tmp_path):
    tiny.write_wan(tmp_path, dtype=torch.bfloat16)
    exact = Pair(tmp_path)
    inputs = exact.inputs(SHAPES[0])
    reference = exact.official(*inputs)
    _, ours = flax_transformer(WanTransformer, WanConfig, RULES, tmp_path, jnp.bfloat16)
    half = WanTransformer3DModel.from_pretrained(tmp_path / "transformer", torch_dtype=torch.bfloat16)
    latents, text, time = map(torch.from_numpy, inputs)
    with torch.no_grad():
        theirs = half(latents.bfloat16(), time, text.bfloat16()).sample.float().numpy()
    assert relative(ours(*inputs).astype(np.float32), reference) <= 1.5 * relative(theirs, reference)


# Conversion


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writing_gives_back_every_official_tensor_bit_for_bit(tmp_path, dtype):
    family = open_family(tiny.write_wan(tmp_path / "model", dtype=dtype))
    official = Checkpoint(family.folder / "transformer")
    state = load_parameters(official, family.abstract_parameters(jnp.float32), RULES)
    write_component(tmp_path / "new", "WanTransformer3DModel", {}, RULES, flat_parameters(state), np.float32)
    written = Checkpoint(tmp_path / "new")
    assert written.keys() == official.keys()
    for key in official.keys():  # noqa: SIM118  (a method, not a mapping)
        np.testing.assert_array_equal(written.read(key), official.read(key).astype(np.float32))


def test_a_converted_checkpoint_keeps_each_parameters_dtype(tmp_path):
    family = open_family(tiny.write_wan(tmp_path / "model", dtype=torch.bfloat16))
    convert_pipeline(family, tmp_path / "new")
    abstract = family.abstract_parameters(jnp.bfloat16)
    direct = load_parameters(Checkpoint(family.folder / "transformer"), abstract, RULES)
    stored = load_transformer(tmp_path / "new", abstract, RULES)
    assert jax.tree.map(lambda p: p.dtype, stored) == jax.tree.map(lambda p: p.dtype, direct)
    jax.tree.map(np.testing.assert_array_equal, stored, direct)
    # Half precision on disk too, where the official folder has it: half the size, nearly.
    sizes = [
        sum(f.stat().st_size for f in (tmp_path / name / "transformer").rglob("*"))
        for name in ("new", "model")
    ]
    assert sizes[0] < 1.6 * sizes[1]
