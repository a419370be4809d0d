"""Z-Image's transformer beside diffusers' own, in float32 on tiny checkpoints."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel

from jaxspd.convert.checkpoint import Checkpoint
from jaxspd.convert.loader import flat_parameters, load_parameters
from jaxspd.convert.table import official_keys
from jaxspd.convert.z_image import RULES
from jaxspd.families import open_family
from jaxspd.models.z_image import ZImageConfig, ZImageTransformer, padded
from tests import tiny
from tests.compare import relative
from tests.parity import assert_each_within, assert_matters, flax_transformer

# Latents of 24 tokens and of 15, neither a multiple of 32, and of 64, which is one.
SHAPES = [(8, 12), (10, 6), (16, 16)]
TEXT_TOKENS = 96
# Filled up to 96 and 32 tokens: one prompt fills the text, of the other's two thirds are masked.
LENGTHS = (70, 9)


class Pair:
    """Our transformer and diffusers' from one pipeline folder, called with the same arrays."""

    def __init__(self, pipeline):
        self.theirs = ZImageTransformer2DModel.from_pretrained(pipeline / "transformer")
        self.config, self.ours = flax_transformer(ZImageTransformer, ZImageConfig, RULES, pipeline)

    def inputs(self, shape, lengths=LENGTHS, seed=0):
        """Two elements that differ in everything; what follows a text's length must not matter."""
        draw = np.random.default_rng(seed)
        latents = draw.standard_normal((2, self.config.in_channels, *shape), dtype=np.float32)
        text = draw.standard_normal((2, TEXT_TOKENS, self.config.cap_feat_dim), dtype=np.float32)
        return [latents, text, np.array(lengths), np.array([0.05, 0.8], np.float32)]

    @torch.no_grad()
    def official(self, latents, text, lengths, time):
        """One by one and unpadded."""
        return np.concatenate(
            [
                self.theirs(
                    [torch.from_numpy(latents[i][:, None])],
                    torch.from_numpy(time[i : i + 1]),
                    [torch.from_numpy(text[i, : lengths[i]])],
                )
                .sample[0]
                .numpy()
                .swapaxes(0, 1)
                for i in range(len(latents))
            ]
        )

    @torch.no_grad()
    def official_batch(self, latents, text, lengths, time):
        """Both at once, as the official pipeline calls it."""
        texts = [torch.from_numpy(one[:length]) for one, length in zip(text, lengths, strict=True)]
        pictures = list(torch.from_numpy(latents[:, :, None]))
        return torch.stack(self.theirs(pictures, torch.from_numpy(time), texts).sample)[:, :, 0].numpy()


@pytest.fixture(scope="module")
def pair(z_image_folder):
    return Pair(z_image_folder)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_padded_velocity_is_diffusers_unpadded_one(pair, shape):
    inputs = pair.inputs(shape)
    ours = pair.ours(*inputs)
    chex.assert_shape(ours, inputs[0].shape)
    assert ours.dtype == jnp.float32
    assert_each_within(1e-5, ours, pair.official(*inputs))
    assert_each_within(1e-5, ours, pair.official_batch(*inputs))


@pytest.mark.parametrize("lengths", [(32, 33), (1, 96)])
def test_prompts_that_end_at_a_multiple_of_32_or_beside_it(pair, lengths):
    inputs = pair.inputs(SHAPES[0], lengths)
    assert_each_within(1e-5, pair.ours(*inputs), pair.official(*inputs))


def test_what_follows_a_prompt_is_not_seen(pair):
    inputs = pair.inputs(SHAPES[1])
    before = np.asarray(pair.ours(*inputs))
    inputs[1] = inputs[1].copy()
    inputs[1][1, LENGTHS[1] :] = 7.0
    np.testing.assert_allclose(pair.ours(*inputs), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": False},
        # Officially too the model is wider than the time's vector.
        {"dim": 288, "n_heads": 12, "n_kv_heads": 12, "axes_dims": [8, 8, 8], "n_layers": 1},
        {"n_refiner_layers": 0},
        {"n_layers": 0},
        {"norm_eps": 1e-2, "rope_theta": 100.0, "t_scale": 10.0, "axes_dims": [8, 4, 4]},
    ],
    ids=["no query and key norms", "wide", "no refiners", "refiners only", "other numbers"],
)
def test_any_configuration_of_the_official_class(tmp_path, options):
    tiny.z_image_transformer(seed=4, **options).save_pretrained(tmp_path / "transformer")
    pair = Pair(tmp_path)
    inputs = pair.inputs(SHAPES[1])
    assert_each_within(1e-5, pair.ours(*inputs), pair.official(*inputs))


# Parity is worth nothing where an input is ignored on both sides, or hardly matters.
@pytest.mark.parametrize("position", [0, 1, 2, 3], ids=["latents", "text", "lengths", "time"])
def test_every_input_matters_to_its_own_batch_element_only(pair, position):
    # Not by scaling it, to which the text's norm is blind.
    assert_matters(pair.ours, pair.inputs(SHAPES[0]), position, np.square)


def test_learned_padding_is_attended(pair, tmp_path):
    """Where image or text is no multiple of 32, and only there."""
    for name, shape, lengths in (("x_pad_token", (16, 16), (5, 70)), ("cap_pad_token", (8, 12), (32, 96))):
        transformer = tiny.z_image_transformer()
        with torch.no_grad():
            getattr(transformer, name).mul_(3)
        transformer.save_pretrained(tmp_path / name / "transformer")
        other = Pair(tmp_path / name)
        full = pair.inputs(shape, lengths)
        np.testing.assert_array_equal(other.ours(*full), pair.ours(*full))
        partial = pair.inputs(SHAPES[0])
        assert relative(other.ours(*partial), pair.ours(*partial)) > 1e-3


def test_rows_and_columns_are_told_apart(pair):
    """Each axis reversed gives something else than the reversed result: position matters on each."""
    latents, *rest = pair.inputs(SHAPES[2])
    velocity = np.asarray(pair.ours(latents, *rest))
    for axis in (2, 3):
        flipped = np.asarray(pair.ours(np.flip(latents, axis).copy(), *rest))
        assert relative(np.flip(flipped, axis), velocity) > 1e-2


@pytest.mark.parametrize(("length", "filled"), [(1, 32), (32, 32), (33, 64), (512, 512)])
def test_lengths_are_filled_up_to_multiples_of_32(length, filled):
    assert padded(length) == filled


def test_bfloat16_is_as_close_to_float32_as_diffusers_is(tmp_path):
    tiny.write_z_image(tmp_path, dtype=torch.bfloat16)
    exact = Pair(tmp_path)
    inputs = exact.inputs(SHAPES[0])
    reference = exact.official(*inputs)
    _, ours = flax_transformer(ZImageTransformer, ZImageConfig, RULES, tmp_path, jnp.bfloat16)
    half = Pair(tmp_path)
    half.theirs.to(torch.bfloat16)
    latents, text, lengths, time = inputs
    with torch.no_grad():
        theirs = half.theirs(
            list(torch.from_numpy(latents[:, :, None]).bfloat16()),
            torch.from_numpy(time),
            [torch.from_numpy(one[:n]).bfloat16() for one, n in zip(text, lengths, strict=True)],
        ).sample
    theirs = torch.stack(theirs)[:, :, 0].float().numpy()
    assert relative(ours(*inputs).astype(np.float32), reference) <= 1.5 * relative(theirs, reference)


def test_every_official_tensor_comes_back_bit_for_bit(z_image_folder):
    family, official = open_family(z_image_folder), Checkpoint(z_image_folder / "transformer")
    loaded = flat_parameters(load_parameters(official, family.abstract_parameters(jnp.float32), RULES))
    for path, key in official_keys(loaded, RULES).items():
        np.testing.assert_array_equal(np.asarray(loaded[path]), official.read(key))
