"""`--max-sequence-length` of any number: a prompt cut there is what diffusers makes of it."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
import pytest
import torch

from jaxspd.planning import reading
from jaxspd.request import SamplingParams
from tests.compare import relative
from tests.components import components
from tests.parity import Loop
from torch_ref.flux1 import Flux1Reference
from torch_ref.flux2 import Flux2Reference
from torch_ref.qwen_image import QwenImageReference
from torch_ref.wan import WanReference
from torch_ref.z_image import ZImageReference

# A token a letter, or nearly so: longer than any of the lengths, with every chat template.
PROMPT = "green hills and a house by the sea, " * 5
SIGMA, GUIDANCE = 0.7, 3.0


@dataclass(frozen=True)
class Case:
    """A family's checkpoint, its judge, how the pipeline encodes one prompt in at most n tokens, and the
    lengths to try.
    """

    folder: str
    reference: type
    text: Callable
    lengths: tuple[int, ...]
    frames: int = 1


def plain(pipeline, n):
    return (pipeline.encode_prompt([PROMPT], do_classifier_free_guidance=False, max_sequence_length=n)[0],)


CASES = {
    "flux1": Case(
        "flux1_folder",
        Flux1Reference,
        lambda pipeline, n: pipeline.encode_prompt([PROMPT], None, max_sequence_length=n)[:2],
        (1, 31),
    ),
    "flux2": Case(
        "klein_base_folder",
        Flux2Reference,
        lambda pipeline, n: (pipeline.encode_prompt([PROMPT], max_sequence_length=n)[0],),
        (1, 33, 50),
    ),
    "qwen_image": Case(
        "qwen_image_folder",
        QwenImageReference,
        lambda pipeline, n: (pipeline.encode_prompt([PROMPT], max_sequence_length=n),),
        (1, 33, 50),
    ),
    "wan": Case("wan_folder", WanReference, plain, (1, 31), frames=5),
    # Filled up to 32, 64 or 96 tokens.
    "z_image": Case("z_image_folder", ZImageReference, plain, (1, 31, 32, 33, 40, 50, 65)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_prompt_cut_at_any_length_is_diffusers(request, name):
    case = CASES[name]
    folder = request.getfixturevalue(case.folder)
    loop = Loop(folder, case.reference.from_pretrained(folder), (8, 12), case.frames)
    velocity = jax.jit(loop.family.velocity_function(np.float32))
    latents = np.random.default_rng(0).standard_normal((1, *loop.leading, 8, 12), dtype=np.float32)
    opened = components(loop.family)
    for length in case.lengths:
        family = reading(loop.family, SamplingParams(max_sequence_length=length))
        conditioning = family.condition(opened.encode_text([PROMPT], family), GUIDANCE)
        expected = family.abstract_conditioning(1)
        assert {k: (v.shape, v.dtype) for k, v in conditioning.items()} == {
            k: (v.shape, v.dtype) for k, v in expected.items()
        }
        if "lengths" in conditioning:
            assert conditioning["lengths"] == [length]  # the prompt does reach the limit
        ours = velocity(loop.parameters, latents, np.float32(SIGMA), conditioning)
        with torch.no_grad():
            text = case.text(loop.reference.pipeline, length)
        embedded = {"guidance_scale": GUIDANCE} if "guidance" in conditioning else {}
        theirs = loop.reference.velocity(torch.from_numpy(latents), SIGMA, *text, **embedded)
        assert relative(ours, theirs) <= 1e-5, length
