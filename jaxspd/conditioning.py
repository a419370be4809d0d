"""From prompts to the denoiser's conditioning."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from jaxspd import processes
from jaxspd.components.pipeline import Components
from jaxspd.progress import aside
from jaxspd.request import Request
from jaxspd.runtime.memory import memory_for
from jaxspd.sampling.guidance import Guided

# How many prompts are encoded at once. They are enough to keep a GPU busy with sequences of 512 tokens, and
# an encoder that cannot stay in memory is not read often. They are few enough that an encoder's hidden states
# take only some gigabytes.
TEXT_BATCH = 8
LESS_TEXT = "use a machine with more memory, or a smaller max_sequence_length"


def conditionings(
    components: Components, family, prompts: list[str], request: Request, seconds: dict[str, Any]
) -> Iterator[Any]:
    """Yields the denoiser's conditioning for each prompt.

    Texts are encoded in batches, as they are needed. The time for that is added to `seconds["encode"]`.
    """
    scale, negative = request.guidance_scale, None
    guided = family.guided(scale)
    # The negative prompt comes first; all prompts share it.
    texts = [request.negative_prompt or ""] * guided + prompts
    for start in range(0, len(texts), TEXT_BATCH):
        begin = time.perf_counter()
        with aside(), memory_for("reading the prompt", LESS_TEXT):
            batch = texts[start : start + TEXT_BATCH]
            encoded = processes.told(partial(components.encode_text, batch, family))
        seconds["encode"] += time.perf_counter() - begin
        for row in range(len(batch)):
            with np.errstate(over="ignore"):  # `denoise` reports what an infinite scale leads to
                one = family.condition({name: a[row : row + 1] for name, a in encoded.items()}, scale)
                scales = np.full(1, scale, np.float32)
            if not guided:
                yield one
            elif start + row == 0:
                negative = one
            else:
                yield Guided(one, negative, scales)
