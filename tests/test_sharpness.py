"""The checks of the demo's sharpness, on drawings: what they find there, and miss where it is gone."""

import numpy as np
import pytest
import sharpness
from scipy.ndimage import gaussian_filter
from training.landscapes import Scene, draw

SCENES = [Scene(time, ground, True) for time in ("dawn", "noon", "night") for ground in ("lake", "meadow")]


@pytest.fixture(scope="module")
def drawings():
    rng = np.random.default_rng(3)
    return np.stack([draw(scene, rng) for scene in SCENES])


def blurred(pictures, sigma):
    return np.stack([gaussian_filter(p.astype(np.float32), (sigma, sigma, 0)) for p in pictures]).astype(
        np.uint8
    )


def test_power_is_nothing_less_than_the_drawings_own(drawings):
    assert all(value == 0 for value in sharpness.band_decibels(drawings, drawings).values())


def test_power_falls_as_a_gaussian_blur_says(drawings):
    """A blur of 1 pixel multiplies power by exp(-(2π·ω/256)²): by -0.7 dB at 16 cycles, -4.2 dB at 40."""
    lost = sharpness.band_decibels(blurred(drawings, 1), drawings)
    assert -4.3 < lost["16-40"] < -0.6
    assert lost["80-128"] < -15


def test_blocks_show_and_textures_do_not(drawings):
    assert sharpness.block_ratio(drawings) < 1.1
    blocky = drawings.copy()
    blocky[:, :, ::8] = np.minimum(blocky[:, :, ::8].astype(int) + 8, 255).astype(np.uint8)
    assert sharpness.block_ratio(blocky) > 1.3


def test_a_blurred_skyline_stands_out_less(drawings):
    sharp, soft = (sharpness.skyline_contrast(p).mean() for p in (drawings, blurred(drawings, 3)))
    assert sharp > 0.15
    assert soft < 0.6 * sharp


def test_a_sky_without_mountains_has_no_skyline(drawings):
    sky = np.repeat(drawings[:, :8].mean((1, 2), keepdims=True), 256, 1).repeat(256, 2).astype(np.uint8)
    assert sharpness.skyline_contrast(sky).max() < 0.01


def test_lakes_mirror_and_meadows_do_not(drawings):
    found = sharpness.mirror_correlation(drawings)
    lake = np.array([scene.ground == "lake" for scene in SCENES])
    assert found[lake].min() > 0.7
    assert found[~lake].max() < 0.5
    # A lake that mirrors other mountains.
    swapped = drawings[lake].copy()
    swapped[:, 160:] = swapped[:, 160:, ::-1]
    assert sharpness.mirror_correlation(swapped).max() < 0.6
