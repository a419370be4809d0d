"""The mapping between a family's official keys and its Flax parameters: a table of rules, which works in both
directions.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

# A layer's number in a parameter's path.
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# The ending of the name of a quantised weight's scales, in files and in our parameters.
SCALE = "_scale"


@dataclass(frozen=True)
class Rule:
    """One official key and the parameter that it fills, with an array of the same shape.

    `official` is the key in the checkpoint, `path` the parameter's dotted path in the Flax module. In both,
    `{}` stands for the number of a layer, which is the same in both.
    """

    official: str
    path: str


def official_keys(paths: Iterable[str], rules: Sequence[Rule]) -> dict[str, str]:
    """The official key of each parameter, by path. The scales of a quantised weight need no rule of their
    own. Raises TypeError if the rules leave a parameter out.
    """
    known = {rule.path: rule.official for rule in rules}

    def key_of(path: str) -> str | None:
        key = known.get(path) or _numbered(path, known)
        if key is None and path.endswith(SCALE):
            weight = key_of(path.removesuffix(SCALE))
            return weight and weight + SCALE
        return key

    keys, unruled = {}, []
    for path in paths:
        if (key := key_of(path)) is None:
            unruled.append(path)
        else:
            keys[path] = key
    if unruled:
        raise TypeError(f"the conversion table has no rule for {', '.join(sorted(unruled))}")
    return keys


def _numbered(path: str, known: dict[str, str]) -> str | None:
    """The official key of a parameter whose path has a layer's number; None if no rule fits."""
    official = known.get(NUMBER.sub("{}", path))
    return official and official.format(*NUMBER.findall(path))


def linear(official: str, path: str) -> Iterator[Rule]:
    """The two rules of a linear layer with bias."""
    yield from matrix(official, path)
    yield Rule(f"{official}.bias", f"{path}.bias")


def matrix(official: str, path: str) -> Iterator[Rule]:
    """The rule of a linear layer without bias."""
    yield Rule(f"{official}.weight", f"{path}.weight")


def scale(official: str, path: str) -> Iterator[Rule]:
    """The rule of a norm with a learned scale."""
    yield Rule(f"{official}.weight", f"{path}.scale")


def joint_attention(official: str, path: str, layer: Callable[[str, str], Iterator[Rule]] = linear):
    """The rules of an attention over the two streams `path.image` and `path.text`, with diffusers' names.
    `layer` makes the rules of one projection.
    """
    for stream, projections, norms, out in (
        ("image", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0"),
        ("text", ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"), "to_add_out"),
    ):
        for name, theirs in zip("qkv", projections, strict=True):
            yield from layer(f"{official}.{theirs}", f"{path}.{stream}.qkv.{name}")
        for name, theirs in zip(("norm_q", "norm_k"), norms, strict=True):
            yield from scale(f"{official}.{theirs}", f"{path}.{stream}.qkv.{name}")
        yield from layer(f"{official}.{out}", f"{path}.{stream}.out")
