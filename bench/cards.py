"""Which card holds which model: a table in Markdown, by `jaxspd plan`'s account of memory.

python bench/cards.py
"""

from dataclasses import replace

from device_models import MODELS, Published

from jaxspd.plan_memory import Memory, plan_memory
from jaxspd.planning import plan_request

# GB of 10⁹ bytes. JAX may take nine tenths of them.
CARDS, SHARE = (12, 16, 24, 32, 48, 80), 0.9


def kinds(published: Published) -> dict[str, Memory]:
    """What the model takes with its weights on the card, and with its layers streamed."""
    request = published.request
    plan = plan_request(published.family, request)
    # Of two forwards, one after the other, each is of one sample.
    lean = replace(request, guidance_scale=0.0, negative_prompt=None)
    families = {"yes": published.family, "streamed": replace(published.family, streamed=True)}
    return {kind: plan_memory(family, lean, plan) for kind, family in families.items()}


def how(kinds: dict[str, Memory], card: int) -> str:
    """How a model runs on a card of so many GB."""
    room = SHARE * card * 1e9
    for kind, memory in kinds.items():
        if max(memory.encode_peak, memory.denoise_peak) <= room:
            return kind + ("" if memory.decode_peak <= room else ", tiles")
    return "no"


def table() -> str:
    """The table."""
    lines = ["| model |" + "".join(f" {card} GB |" for card in CARDS), "|---|" + "---|" * len(CARDS)]
    for model in MODELS:
        memories = kinds(Published(model))
        lines.append(f"| {model.name} |" + "".join(f" {how(memories, card)} |" for card in CARDS))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
