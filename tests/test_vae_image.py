"""Autoencoders of pictures beside diffusers' own, and their tables beside the official checkpoints."""

from collections import Counter
from math import prod

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from flax import nnx

from jaxspd.convert.loader import assign, flat_parameters
from jaxspd.convert.vae_image import UNREAD
from jaxspd.errors import UsageError
from jaxspd.models.vae import abstract_autoencoder, tiles
from jaxspd.models.vae.coder import program_bytes
from jaxspd.models.vae.image_config import AutoencoderKLConfig, AutoencoderKLFlux2Config
from tests.autoencoders import (
    assert_near,
    coder_of,
    key_list_md5,
    official_decode,
    official_encode,
    psnr,
    read,
    rules_of,
)
from tests.tiny import flux1_vae, flux2_vae, randomise

LEVELS = 3
KINDS = {
    "down_block_types": ("DownEncoderBlock2D",) * LEVELS,
    "up_block_types": ("UpDecoderBlock2D",) * LEVELS,
}


def without_attention() -> AutoencoderKL:
    """As the demo's, and with what FLUX.1's has not: convolutions beside encoder and decoder."""
    vae = AutoencoderKL(
        **KINDS,
        block_out_channels=(3, 6, 9),
        layers_per_block=2,
        latent_channels=5,
        norm_num_groups=3,
        mid_block_add_attention=False,
    )
    randomise(vae, 1)
    return vae


def other_decoder() -> AutoencoderKLFlux2:
    """FLUX.2's kind with a decoder of other widths, and no convolution beside either."""
    vae = AutoencoderKLFlux2(
        **KINDS,
        block_out_channels=(4, 4, 8),
        decoder_block_out_channels=(4, 12, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    randomise(vae, 2)
    return vae


@pytest.mark.parametrize("make", [flux1_vae, flux2_vae, without_attention, other_decoder])
def test_pixels_and_latents_are_the_official_ones(make, tmp_path):
    vae = make()
    coder = coder_of(vae, tmp_path)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, coder.config.latent_channels, 5, 6), dtype=np.float32)
    theirs = official_decode(vae, latents)
    assert (np.abs(theirs) < 1).mean() > 0.1  # the rest is cut off
    assert_near(coder.decode(latents), theirs)

    pixels = rng.uniform(-1, 1, theirs.shape).astype(np.float32)
    assert_near(coder.encode(pixels), official_encode(vae, pixels))
    assert coder.compiled_programs == 2


def test_half_precision_keeps_statistics_exact(tmp_path):
    vae = flux2_vae()
    coder = coder_of(vae, tmp_path, jnp.bfloat16)
    exact = {path for path, leaf in flat_parameters(coder.parameters).items() if leaf.dtype == jnp.float32}
    assert {path for path in exact if not path.endswith("bias")} == {"mean", "variance"}
    latents = np.random.default_rng(0).standard_normal((1, 4, 6, 6), dtype=np.float32)
    pixels = coder.decode(latents)
    assert pixels.dtype == np.float32
    assert psnr(pixels, official_decode(vae, latents)) > 35


def test_latents_are_normalised_as_pipelines_do(tmp_path):
    latents = np.random.default_rng(0).standard_normal((2, 4, 6, 8), dtype=np.float32)
    coder = coder_of(flux1_vae(), tmp_path / "kl")
    np.testing.assert_allclose(coder.normalise(latents), (latents - 0.1159) * 0.3611, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(coder.denormalise(coder.normalise(latents)), latents, atol=1e-5)


@torch.no_grad()
def test_latents_are_normalised_by_running_statistics(tmp_path):
    vae = flux2_vae()
    coder = coder_of(vae, tmp_path)
    latents = np.random.default_rng(0).standard_normal((2, 4, 6, 8), dtype=np.float32)
    patches = torch.from_numpy(latents).reshape(2, 4, 3, 2, 4, 2).permute(0, 1, 3, 5, 2, 4)
    theirs = vae.bn.eval()(patches.reshape(2, 16, 3, 4)).numpy()
    np.testing.assert_allclose(coder.normalise(latents), theirs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(coder.denormalise(theirs), latents, atol=1e-5)


OFFICIAL = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
FLUX1 = OFFICIAL | {
    "_class_name": "AutoencoderKL",
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "force_upcast": True,
    "latents_mean": None,
}
FLUX2 = OFFICIAL | {"_class_name": "AutoencoderKLFlux2", "latent_channels": 32, "batch_norm_eps": 1e-4}


@pytest.mark.parametrize(
    ("given", "count", "total", "md5"),
    [
        (FLUX1, 244, 83_819_683, "1aafa3cc91716fb6b300cc1cd51b85a3"),
        (FLUX2, 251, 84_046_372, "c54288e3ee12ca215898840682337b95"),
    ],
    ids=["FLUX.1 and Z-Image", "FLUX.2"],
)
def test_official_checkpoints_fit_key_by_key(given, count, total, md5):
    """The hash is that of the published file's keys and shapes."""
    abstract = abstract_autoencoder(read(given))
    parameters, rules = flat_parameters(nnx.state(abstract)), rules_of(abstract.config)
    by_path = {rule.path: rule.official for rule in rules}
    shapes = {by_path[path]: array.shape for path, array in parameters.items()}
    shapes |= {key: () for key in UNREAD if given is FLUX2}
    assert len(shapes) == count
    assert sum(map(prod, shapes.values())) == total
    assert key_list_md5(shapes) == md5
    assert set(assign(set(shapes) - UNREAD, shapes.__getitem__, parameters, rules)) == set(parameters)


def test_no_rule_is_written_twice():
    rules = rules_of(AutoencoderKLFlux2Config())
    for names in ([rule.official for rule in rules], [rule.path for rule in rules]):
        assert max(Counter(names).values()) == 1


@pytest.mark.parametrize(
    ("ours", "official"),
    [(AutoencoderKLConfig, AutoencoderKL), (AutoencoderKLFlux2Config, AutoencoderKLFlux2)],
)
def test_config_defaults_are_the_official_classs(ours, official):
    with torch.device("meta"):
        theirs = official().config
    own = vars(ours()).keys() - {"sample_size"}  # which only says what size a model is for
    assert {name: vars(ours())[name] for name in own} == {name: theirs[name] for name in own}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"act_fn": "gelu"}, 'act_fn must be "silu"'),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types must be"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "up_block_types must be"),
        ({"latents_mean": [0.0] * 16}, "latents_mean must be null"),
        ({"norm_num_groups": 48}, "norm_num_groups must divide every width"),
        ({"block_out_channels": 128}, "block_out_channels must be a list"),
        ({"layers_per_block": 0}, "layers_per_block must be 1 or more"),
        ({"scaling_factor": "1"}, "scaling_factor must be a finite number"),
        ({"use_quant_conv": 1}, "use_quant_conv must be true or false"),
        ({"wavelets": 2}, "wavelets = 2 is not known"),
    ],
)
def test_what_is_not_understood_is_refused(change, told):
    with pytest.raises(UsageError, match=told) as error:
        read(FLUX1 | change)
    assert "\n" not in str(error.value)


def test_what_changes_nothing_is_read_over():
    assert read(FLUX1 | {"sample_size": 512, "wavelets": None, "tiles": False}).scale == 8
    assert read(FLUX1 | {"shift_factor": None}).shift_factor is None


@pytest.mark.parametrize(("length", "count"), [(30, 1), (30, 2), (61, 3), (104, 4), (104, 8)])
def test_tiles_cover_a_map_and_their_weights_add_up_to_one(length, count):
    begins, tile, scale = tiles.starts(length, count), tiles.tile_length(length, count), 8
    assert (begins[0], begins[-1] + tile) == (0, length)
    shared = np.diff(begins) - tile if count > 1 else np.array([-tiles.OVERLAP])
    assert (-shared >= tiles.OVERLAP - 1).all()
    total = np.zeros(scale * length)
    for begin, fade in zip(begins, tiles.weights(length, count, scale), strict=True):
        assert (fade > 0).all()
        total[scale * begin : scale * (begin + tile)] += fade
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_tiles_are_decoded_alone_and_blended_where_they_meet(tmp_path):
    coder = coder_of(without_attention(), tmp_path)
    latents = np.random.default_rng(0).standard_normal((1, 5, 16, 28), dtype=np.float32)
    whole, tiled = coder.decode(latents), coder.decode(latents, splits=(1, 2))
    tile, scale = tiles.tile_length(28, 2), coder.config.scale
    left, right = coder.decode(latents[..., :tile]), coder.decode(latents[..., -tile:])
    alone, meet = scale * (28 - tile), scale * tile
    np.testing.assert_array_equal(tiled[:, :, :alone], left[:, :, :alone])
    np.testing.assert_array_equal(tiled[:, :, meet:], right[:, :, meet - alone :])
    both = np.stack([left[:, :, alone:], right[:, :, : meet - alone]])
    low, high = both.min(0), both.max(0)
    assert (low < high).mean() > 0.5
    assert (tiled[:, :, alone:meet] >= low - 1e-6).all()
    assert (tiled[:, :, alone:meet] <= high + 1e-6).all()
    assert not np.array_equal(tiled, whole)


def test_memory_decides_about_tiles(tmp_path):
    coder = coder_of(without_attention(), tmp_path)
    shape = (1, 24, 40, 5)
    assert coder.plan("decode", shape) == (1, 1)
    needed = coder._compile("decode", shape, (1, 1)).bytes
    coder.budget = needed
    assert coder.plan("decode", shape) == (1, 1)
    coder.budget = needed - 1
    splits = coder.plan("decode", shape)
    assert splits == (1, 2)
    assert program_bytes(coder._compile("decode", shape, splits).first) <= coder.budget
    coder.budget = needed // 1000
    with pytest.raises(UsageError, match="even the smallest tile"):
        coder.plan("decode", shape)
    coder.budget = needed - 1
    latents = np.random.default_rng(0).standard_normal((1, 5, 24, 40), dtype=np.float32)
    assert coder.decode(latents).shape == (1, 96, 160, 3)


def test_sizes_that_divide_into_no_latents_are_refused(tmp_path):
    coder = coder_of(without_attention(), tmp_path)
    with pytest.raises(UsageError, match="30×32 pixels do not divide into latents; use multiples of 4"):
        coder.encode(np.zeros((1, 32, 30, 3), np.float32))
