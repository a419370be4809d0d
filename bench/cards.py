"""Prints a Markdown table that says which card holds which model, by `jaxspd plan`'s count of memory.

python bench/cards.py
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

from device_models import MODELS, Published
from presets import Model

from jaxspd.plan_memory import Memory, plan_memory
from jaxspd.planning import plan_request

# The cards' memory in GB of 10⁹ bytes. JAX may take nine tenths of it.
CARDS, SHARE = (12, 16, 24, 32, 48, 80), 0.9
# The ways to keep the weights, the best first.
WAYS = {"yes": {}, "int8": {"quantize": "int8"}, "streamed": {"streamed": True}}


def memory(model: Model, way: str) -> Memory:
    """The memory that the model takes if its weights are kept that `way` and guidance takes two forwards."""
    published = Published(model)
    request = replace(published.request, guidance_scale=0.0, negative_prompt=None)
    plan = plan_request(published.family, published.request)
    return plan_memory(replace(published.family, **WAYS[way]), request, plan)


def how(taken_by: Callable[[str], Memory], card: int) -> str:
    """How a model runs on a card of `card` GB."""
    room = SHARE * card * 1e9
    for way in WAYS:
        taken = taken_by(way)
        if max(taken.encode_peak, taken.denoise_peak) <= room:
            return way + ("" if taken.decode_peak <= room else ", tiles")
    return "no"


def row(model: Model) -> str:
    """The model's row of the table."""
    taken_by = cache(partial(memory, model))
    return f"| {model.name} |" + "".join(f" {how(taken_by, card)} |" for card in CARDS)


def table() -> str:
    """The table in Markdown."""
    lines = ["| model |" + "".join(f" {card} GB |" for card in CARDS), "|---|" + "---|" * len(CARDS)]
    return "\n".join([*lines, *(row(model) for model in MODELS if not model.quantize)])


if __name__ == "__main__":
    print(table())
