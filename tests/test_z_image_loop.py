"""The whole denoising of Z-Image beside the PyTorch reference: guidance, growth."""

import numpy as np
import pytest

from jaxspd.planning import plan_request
from jaxspd.request import SamplingParams
from tests.compare import relative
from tests.parity import STEEP, Loop, assert_each_within
from torch_ref.z_image import ZImageReference

# Filled up to 32 and 64 tokens.
PROMPTS, NEGATIVES = ["a lake", "a wide green meadow under the midday sun"], ["", "haze " * 10]
STEPS, DELTA = 14, 0.05


def open_loop(folder):
    return Loop(folder, ZImageReference.from_pretrained(folder), text_tokens=64)


@pytest.fixture(scope="module")
def loop(z_image_folder):
    return open_loop(z_image_folder)


@pytest.mark.parametrize("guidance", [0.0, 4.0], ids=["unguided", "guided"])
@pytest.mark.parametrize(
    ("mode", "levels", "split"),
    [("fullres", 0, [14]), ("dct", 1, [10, 4]), ("dct_rewind", 1, [10, 4]), ("dct_rewind", 2, [5, 5, 4])],
)
def test_latents_are_the_references(loop, mode, levels, split, guidance):
    plan = loop.plan(mode, levels, STEPS, DELTA)
    assert [stage.steps for stage in plan.stages] == split
    assert_each_within(1e-4, *loop.both(plan, PROMPTS, NEGATIVES, guidance))


def test_turbo_differs_by_its_schedule(z_image_turbo_folder):
    turbo = open_loop(z_image_turbo_folder)
    plan = turbo.plan("dct_rewind", 1, turbo.family.default_steps, DELTA)
    assert [stage.steps for stage in plan.stages] == [5, 3]
    assert_each_within(1e-4, *turbo.both(plan, PROMPTS, NEGATIVES, turbo.family.default_guidance))


def test_latents_on_the_schedulers_own_levels_are_the_references(loop):
    amplitude, exponent = STEEP
    params = SamplingParams(
        num_inference_steps=STEPS,
        height=128,
        width=192,
        progressive_mode="dct_rewind",
        progressive_delta=DELTA,
        spectrum={"amplitude": amplitude, "exponent": exponent},
        noise_levels="scheduler",
    )
    plan = plan_request(loop.family, params)
    official = loop.plan("dct_rewind", 1, STEPS, DELTA)
    assert plan.stages[0].sigmas != official.stages[0].sigmas
    ours, theirs = loop.both(plan, PROMPTS, NEGATIVES, 4.0, noise_levels="scheduler")
    assert_each_within(1e-4, ours, theirs)
    assert relative(ours, loop.both(official, PROMPTS, NEGATIVES, 4.0)[0]) > 0.01


def test_guidance_counts_from_the_prompts_own_prediction(loop):
    draw = np.random.default_rng(0)
    positive, negative = (draw.standard_normal((2, 4, 4, 6), dtype=np.float32) for _ in range(2))
    for scale in (0.0, 1.0, 4.0):
        np.testing.assert_allclose(
            loop.family.combine(positive, negative, scale),
            (1 + scale) * positive - scale * negative,
            rtol=1e-5,
            atol=1e-5,
        )
    # So only 0 and less is a single pass.
    assert [loop.family.guided(scale) for scale in (0.0, 0.5, 1.0, 4.0)] == [False, True, True, True]


def test_modes_and_guidance_give_latents_of_their_own(loop):
    """Else one could pass for another."""
    results = [
        loop.both(loop.plan(mode, levels, STEPS, DELTA), PROMPTS, NEGATIVES, guidance)[0]
        for mode, levels in (("fullres", 0), ("dct", 1), ("dct_rewind", 1))
        for guidance in (0.0, 4.0)
    ]
    for number, one in enumerate(results):
        for other in results[:number]:
            assert relative(one, other) > 0.01
