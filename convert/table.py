"""How a family's official keys correspond to its Flax parameters: a table of rules, read both ways."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """One official key pattern and the parameter it fills, with arrays of the same shape.

    `official` is the key in the checkpoint; a `{}` in it stands for the layer number, and the
    parameter is then a tuple of arrays, one a layer. `path` is the parameter's dotted path in the Flax
    module.
    """

    official: str
    path: str

    def arrays(self, parameter: Any) -> dict[str, Any]:
        """The arrays of a parameter by the official keys that fill them."""
        layers = parameter if isinstance(parameter, tuple) else (parameter,)
        return {self.official.format(number): layer for number, layer in enumerate(layers)}


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
    """The rules of an attention in which the streams `path.image` and `path.text` meet, as diffusers
    names its parts; `layer` makes those of one projection.
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
