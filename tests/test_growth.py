"""Every way of growing beside the PyTorch reference, in every family."""

import numpy as np
import pytest

from tests.compare import relative
from tests.parity import Loop, assert_each_within
from torch_ref.flux1 import Flux1Reference
from torch_ref.flux2 import Flux2Reference
from torch_ref.qwen_image import QwenImageReference
from torch_ref.wan import WanReference
from torch_ref.z_image import ZImageReference

PROMPTS, STEPS, DELTA = ["a lake", "a wide green meadow under the midday sun"], 14, 0.05
# What the plan is asked, and what the reference is told where it says it otherwise.
THIRDS = {"scales": ["1/3", "2/3", "1"]}
OPTIONS = {
    "fft": {"transform": "fft"},
    "fft, any ratio": {"transform": "fft", **THIRDS},
    "dct, any ratio": THIRDS,
    "dwt, two levels": {"transform": "dwt", "levels": 2},
    "given sigmas": {"sigmas": [0.9, 0.6], "levels": 2},
    "re-spaced": {"respace": True, "levels": 2},
    "fresh noise": {"noise": "fresh"},
    "forecast": {"forecast": 0.5},
    "UniPC": {"scheduler": "unipc"},
    "UniPC, carried": {"scheduler": "unipc", "history": "carry", "levels": 2},
    "UniPC, carried, any ratio": {"scheduler": "unipc", "history": "carry", "shift": "stage", **THIRDS},
    "UniPC, carried and forecast": {"scheduler": "unipc", "history": "carry", "forecast": 0.5},
    "each stage's shift": {"shift": "stage"},
    "each stage's shift, re-spaced": {"shift": "stage", "respace": True, **THIRDS},
}


@pytest.fixture(scope="module")
def flux1(flux1_folder):
    reference = Flux1Reference.from_pretrained(flux1_folder)
    return Loop(flux1_folder, reference, texts=reference.encode)


def compare(loop, options, mode="dct_rewind", guidance=1.0, **others):
    """Latents of both sides, which must be each other's."""
    settings = {"mode": mode, "delta": DELTA, **options}
    if "sigmas" in options:
        del settings["delta"]
    plan = loop.request(STEPS, **{name: value for name, value in settings.items() if name != "scheduler"})
    assert min(stage.steps for stage in plan.stages) > 1
    growth = {name: value for name, value in options.items() if name not in ("scales", "sigmas")}
    if "scales" in options:
        growth["scales"] = (1 / 3, 2 / 3, 1.0)
    if "sigmas" in options:
        growth["thresholds"], growth["delta"] = options["sigmas"], 0.0
    ours, theirs = loop.both(plan, PROMPTS, PROMPTS, guidance, **growth, **others)
    assert_each_within(1e-4, ours, theirs)
    return ours


def test_every_option_is_the_references_and_none_is_another(flux1):
    made = {name: compare(flux1, options) for name, options in OPTIONS.items()}
    made |= {"dct": compare(flux1, {}), "dct, two levels": compare(flux1, {"levels": 2})}
    made["UniPC, two levels"] = compare(flux1, {"scheduler": "unipc", "levels": 2})
    made["UniPC, carried, no rewind"] = compare(flux1, OPTIONS["UniPC, carried"], mode="dct")
    for number, (name, latents) in enumerate(made.items()):
        for other in list(made)[:number]:
            assert relative(latents, made[other]) > 0.005, (name, other)


def test_without_a_rewind_there_is_nothing_to_space_anew(flux1):
    settings = {"mode": "dct", "delta": DELTA, "levels": 2}
    plain, respaced = (flux1.request(STEPS, **settings, respace=respace) for respace in (False, True))
    for one, other in zip(plain.stages, respaced.stages, strict=True):
        np.testing.assert_allclose(one.sigmas, other.sigmas, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", ["patchified", "latent"])
def test_flux2(klein_folder, grid):
    reference = Flux2Reference.from_pretrained(klein_folder)
    texts = lambda prompts: (reference.encode(prompts, 48),)  # noqa: E731
    loop = Loop(klein_folder, reference, latent=(12, 18), texts=texts, text_tokens=48)
    for name in ("fft, any ratio", "each stage's shift, re-spaced", "fresh noise", "forecast"):
        compare(loop, OPTIONS[name], grid=grid)
    compare(loop, OPTIONS["UniPC, carried, any ratio"], grid=grid)


def test_qwen_image(qwen_image_folder):
    loop = Loop(qwen_image_folder, QwenImageReference.from_pretrained(qwen_image_folder), text_tokens=48)
    for name in ("dwt, two levels", "each stage's shift", "re-spaced", "forecast"):
        compare(loop, OPTIONS[name])


def test_z_image(z_image_folder):
    loop = Loop(z_image_folder, ZImageReference.from_pretrained(z_image_folder), text_tokens=64)
    for name in ("fft, any ratio", "dct, any ratio", "forecast"):
        compare(loop, OPTIONS[name], guidance=0.0)
    compare(loop, {"respace": True, **THIRDS}, guidance=0.0)


def test_wan(wan_folder):
    reference = WanReference.from_pretrained(wan_folder)
    loop = Loop(wan_folder, reference, frames=5, texts=lambda prompts: reference.encode(prompts)[:1])
    for name in ("dwt, two levels", "re-spaced", "given sigmas", "forecast", "UniPC, carried"):
        compare(loop, OPTIONS[name])
