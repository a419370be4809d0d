"""Causal autoencoders beside diffusers' own: chunks, what they carry, tiles, and the official checkpoint."""

from collections import Counter
from math import prod

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from flax import nnx

from jaxspd.convert.loader import assign, flat_parameters
from jaxspd.errors import UsageError
from jaxspd.models.vae import Coder, abstract_autoencoder, tiles
from jaxspd.models.vae.video_config import VideoAutoencoderConfig
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
from tests.tiny import qwen_image_vae, randomise, wan_vae

STATISTICS = {"latents_mean": [0.1, 0.2, -0.3], "latents_std": [1.0, 2.0, 0.5]}


def four_channels() -> AutoencoderKLQwenImage:
    """Qwen-Image's kind with an alpha channel, fewer levels, and time halved at the first only."""
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=3,
        dim_mult=[1, 2, 3],
        num_res_blocks=2,
        temperal_downsample=[True, False],
        input_channels=4,
        **STATISTICS,
    )
    randomise(vae, 1)
    return vae


def other_decoder() -> AutoencoderKLWan:
    """Wan's kind with a wider decoder, and time left as it is."""
    vae = AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=6,
        z_dim=3,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        scale_factor_temporal=1,
        scale_factor_spatial=2,
        **STATISTICS,
    )
    randomise(vae, 2)
    return vae


def latents_of(coder: Coder, *size: int, seed: int = 0) -> np.ndarray:
    shape = (1, coder.config.z_dim, *size)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("make", [wan_vae, four_channels, other_decoder])
def test_pixels_and_latents_are_the_official_ones(make, tmp_path):
    vae = make()
    coder = coder_of(vae, tmp_path)
    latents = np.concatenate([latents_of(coder, 3, 4, 6, seed=seed) for seed in (0, 1)])
    theirs = official_decode(vae, latents)
    assert (np.abs(theirs) < 1).mean() > 0.5  # the rest is cut off
    assert_near(coder.decode(latents), theirs)

    # Diffusers takes frames by fours, whatever a latent frame holds.
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 9, *theirs.shape[2:])).astype(np.float32)
    assert_near(coder.encode(pixels), official_encode(vae, pixels))


def test_a_longer_video_compiles_nothing(tmp_path, compiled):
    vae = qwen_image_vae()
    coder = coder_of(vae, tmp_path)
    for frames, programs in ((1, 1), (2, 3), (5, 3), (1, 3)):
        latents = latents_of(coder, frames, 4, 3)
        before = len(compiled)
        pixels = coder.decode(latents)
        assert pixels.shape == (1, 1 + 4 * (frames - 1), 32, 24, 3)
        assert coder.compiled_programs == programs
        if frames in (5, 1) and programs == 3:
            assert len(compiled) == before
        assert_near(pixels, official_decode(vae, latents))
    for frames, programs in ((1, 4), (5, 6), (9, 6)):
        pixels = np.random.default_rng(0).uniform(-1, 1, (1, frames, 32, 24, 3)).astype(np.float32)
        assert_near(coder.encode(pixels), official_encode(vae, pixels))
        assert coder.compiled_programs == programs


def test_a_picture_carries_nothing(tmp_path):
    coder = coder_of(other_decoder(), tmp_path)
    latents = latents_of(coder, 1, 6, 4)
    picture = coder.decode(latents)
    [program] = coder._programs.values()
    assert program.memory_analysis().output_size_in_bytes < 2 * picture.nbytes
    # Of a video it is the first frame, which leaves all that later ones need.
    video = coder.decode(np.concatenate([latents, latents], axis=2))
    np.testing.assert_allclose(video[:, :1], picture, rtol=0, atol=1e-6)


def test_half_precision_is_near(tmp_path):
    vae = wan_vae()
    coder = coder_of(vae, tmp_path, jnp.bfloat16)
    latents = latents_of(coder, 2, 4, 6)
    pixels = coder.decode(latents)
    assert pixels.dtype == np.float32
    assert psnr(pixels, official_decode(vae, latents)) > 30


def test_latents_are_normalised_channel_by_channel(tmp_path):
    coder = coder_of(other_decoder(), tmp_path)
    latents = latents_of(coder, 2, 3, 4)
    mean, std = (np.array(STATISTICS[name])[:, None, None, None] for name in STATISTICS)
    np.testing.assert_allclose(coder.normalise(latents), (latents - mean) / std, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(coder.denormalise(coder.normalise(latents)), latents, atol=1e-5)


def test_each_tile_carries_its_own_frames(tmp_path):
    coder = coder_of(other_decoder(), tmp_path)
    latents = latents_of(coder, 3, 16, 28)
    whole, tiled = coder.decode(latents), coder.decode(latents, splits=(1, 2))
    tile, scale = tiles.tile_length(28, 2), coder.config.scale
    left, right = coder.decode(latents[..., :tile]), coder.decode(latents[..., -tile:])
    alone, meet = scale * (28 - tile), scale * tile
    np.testing.assert_array_equal(tiled[..., :alone, :], left[..., :alone, :])
    np.testing.assert_array_equal(tiled[..., meet:, :], right[..., meet - alone :, :])
    assert 25 < psnr(tiled, whole) < 100

    pixels = np.random.default_rng(0).uniform(-1, 1, whole.shape).astype(np.float32)
    halves = coder.encode(pixels, splits=(1, 2))
    assert halves.shape == latents.shape
    np.testing.assert_array_equal(
        halves[..., : 28 - tile], coder.encode(pixels[..., :meet, :])[..., : 28 - tile]
    )


OFFICIAL = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
}


def test_a_480p_video_is_decoded_whole_in_8_gb():
    """By the compiler's account, with the official widths in float32; nothing is run."""
    abstract = abstract_autoencoder(read(OFFICIAL))
    coder = Coder(abstract, nnx.state(abstract), budget=8 * 2**30)
    assert coder.plan("decode", (1, 21, 480 // 8, 832 // 8, 16)) == (1, 1)
    assert coder.compiled_programs == 2


def test_official_checkpoint_fits_key_by_key():
    """The hash is that of the published files' keys and shapes, Wan's and Qwen-Image's alike."""
    abstract = abstract_autoencoder(read(OFFICIAL))
    parameters, rules = flat_parameters(nnx.state(abstract)), rules_of(abstract.config)
    by_path = {rule.path: rule.official for rule in rules}
    shapes = {by_path[path]: array.shape for path, array in parameters.items()}
    assert len(shapes) == 194
    assert sum(map(prod, shapes.values())) == 126_892_531
    assert key_list_md5(shapes) == "ed4ea5824d55ec3107b09815e318123a"
    assert set(assign(set(shapes), shapes.__getitem__, parameters, rules)) == set(parameters)


def test_no_rule_is_written_twice():
    rules = rules_of(VideoAutoencoderConfig())
    for names in ([rule.official for rule in rules], [rule.path for rule in rules]):
        assert max(Counter(names).values()) == 1


def test_config_defaults_are_the_official_classs():
    with torch.device("meta"):
        wan, qwen = dict(AutoencoderKLWan().config), dict(AutoencoderKLQwenImage().config)
    ours = vars(VideoAutoencoderConfig())
    told = {name: tuple(value) if isinstance(value, list) else value for name, value in wan.items()}
    assert {name: told[name] for name in ours} == ours
    for name, given in (("AutoencoderKLQwenImage", qwen), ("AutoencoderKLWan", wan)):
        assert read({**given, "_class_name": name}) == VideoAutoencoderConfig()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"is_residual": True, "patch_size": 2}, "Wan 2.2 5B's"),
        ({"patch_size": 2}, "patch_size must be null"),
        ({"attn_scales": [0.5]}, r"attn_scales must be \[\]"),
        ({"temperal_downsample": [True, True]}, "temperal_downsample must have 3 entries"),
        ({"z_dim": 8}, "must be a list of z_dim, 8, numbers"),
        ({"decoder_base_dim": 0}, "decoder_base_dim must be a whole number in range or null"),
        ({"dim_mult": [1, 2, 4, 4.5]}, "dim_mult must be a list of values, each a whole number in range"),
        ({"shuffles": True}, "shuffles = true is not known"),
    ],
)
def test_what_is_not_understood_is_refused(change, told):
    with pytest.raises(UsageError, match=told) as error:
        read(OFFICIAL | change)
    assert "\n" not in str(error.value)


def test_lengths_that_divide_into_no_latents_are_refused(tmp_path):
    coder = coder_of(wan_vae(), tmp_path)
    with pytest.raises(UsageError, match="one more than a multiple of 4"):
        coder.encode(np.zeros((1, 4, 32, 32, 3), np.float32))
