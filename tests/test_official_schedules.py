"""Noise levels that are published for real checkpoints, from their own scheduler's configuration."""

import numpy as np
import pytest

from jaxspd.families import family_class, open_family
from jaxspd.sampling.schedule import default_sigmas, empirical_shift
from tests.test_official_configs import FOLDERS, WAN_SCHEDULER, write_folder


def of(name, tmp_path):
    return open_family(write_folder(tmp_path / name, *FOLDERS[name]))


PUBLISHED = [
    ("FLUX.1-dev", 4096, [1, 0.9045307636, 0.7595109344, 0.5128441453, 0]),
    (
        "FLUX.1-dev",
        4096,
        [
            1,
            0.9567236900,
            0.9045307636,
            0.8403487802,
            0.7595109343,
            0.6545667648,
            0.5128441453,
            0.3109010756,
            0,
        ],
    ),
    # 512×512 and 1024×1024
    ("FLUX.2-klein-4B", 1024, [1, 0.9580853581, 0.8839818835, 0.7174965739, 0]),
    ("FLUX.2-klein-9B", 4096, [1, 0.9673840404, 0.9081439376, 0.7671999335, 0]),
    # 1216×864
    (
        "Qwen-Image-2512",
        76 * 54,
        [1, 0.9160475, 0.8200923, 0.7093592, 0.5801504, 0.4274216, 0.2441077, 0.02, 0],
    ),
    # The authors' eight forwards, which their card calls nine steps.
    ("Z-Image-Turbo", 4096, [1, 0.9545455, 0.9, 0.8333333, 0.75, 0.6428571, 0.5, 0.3, 0]),
]


@pytest.mark.parametrize(("name", "tokens", "published"), PUBLISHED)
def test_noise_levels_are_the_published_ones(tmp_path, name, tokens, published):
    ours = of(name, tmp_path).sigmas(len(published) - 1, tokens)
    np.testing.assert_allclose(ours, published, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "steps", "mu"),
    [
        (4096, 4, 2.2911798941),
        (1024, 50, 1.7019562073),
        (4800, 10, 1.26916266),
        (4096, 50, 2.0233511571292637),
    ],
)
def test_flux2s_shift_is_the_published_one(tokens, steps, mu):
    assert empirical_shift(tokens, steps) == pytest.approx(mu, rel=1e-9)


LATER = [889, 867, 842, 812, 774, 728, 667, 586, 473, 300]


@pytest.mark.parametrize(
    ("shift", "published"),
    [
        (5.0, [999, 937, 833, 625]),
        (3.0, [999, 937, 857, 750, 600, 376]),
        (3.0, [999, 954, 900, 833, 750, 643, 500, 301]),
        (
            8.0,
            [999, 993, 986, 978, 969, 960, 949, 937, 923, 907, *LATER],
        ),
    ],
)
def test_wans_time_steps_are_the_published_ones(shift, published):
    ours = default_sigmas(WAN_SCHEDULER | {"flow_shift": shift}, len(published))
    # As the model is told them.
    assert np.floor(np.float32(1000) * ours[:-1]).tolist() == published
    assert family_class("wan")().sigmas(len(published), 0, shift).tolist() == ours.tolist()
