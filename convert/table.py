"""How a family's official keys correspond to its Flax parameters: a table of rules, read both ways."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Rule:
    """One official key pattern and the parameter it fills.

    `official` is the key in the checkpoint; a `{}` in it stands for the layer number, and the
    parameter is then a tuple of arrays, one a layer. `path` is the parameter's dotted path in the Flax
    module. `transform` turns the official array into ours; `inverse`, where it is not the same, back.
    """

    official: str
    path: str
    transform: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray] | None = None

    def restore(self, array: np.ndarray) -> np.ndarray:
        """Our array in the official layout."""
        return (self.inverse or self.transform)(array)

    def arrays(self, parameter: Any) -> dict[str, Any]:
        """The arrays of a parameter by the official keys that fill them."""
        layers = parameter if isinstance(parameter, tuple) else (parameter,)
        return {self.official.format(number): layer for number, layer in enumerate(layers)}


def transpose(array: np.ndarray) -> np.ndarray:
    """PyTorch keeps a linear layer's weight as `[out, in]`, Flax its kernel as `[in, out]`."""
    return array.T


def keep(array: np.ndarray) -> np.ndarray:
    return array


def channels_last(array: np.ndarray) -> np.ndarray:
    """PyTorch keeps a convolution's weight as `[out, in, *window]`, Flax as `[*window, in, out]`."""
    return np.moveaxis(array, (0, 1), (-1, -2))


def channels_first(array: np.ndarray) -> np.ndarray:
    """The inverse of `channels_last`."""
    return np.moveaxis(array, (-1, -2), (0, 1))


def patches(official: str, path: str) -> Iterator[Rule]:
    """The two rules of a patch embedding: a convolution whose windows do not overlap."""
    yield Rule(f"{official}.weight", f"{path}.kernel", channels_last, channels_first)
    yield Rule(f"{official}.bias", f"{path}.bias", keep)


def linear(official: str, path: str) -> Iterator[Rule]:
    """The two rules of a linear layer with bias."""
    yield Rule(f"{official}.weight", f"{path}.kernel", transpose)
    yield Rule(f"{official}.bias", f"{path}.bias", keep)


def matrix(official: str, path: str) -> Iterator[Rule]:
    """The rule of a linear layer without bias."""
    yield Rule(f"{official}.weight", f"{path}.kernel", transpose)


def scale(official: str, path: str) -> Iterator[Rule]:
    """The rule of a norm with a learned scale."""
    yield Rule(f"{official}.weight", f"{path}.scale", keep)


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
