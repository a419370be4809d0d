"""The forms in which a LoRA file stores ΔW, the matrix that it adds to a tensor.

Sources: LoRA, arXiv 2106.09685; LoHa, arXiv 2108.06098; LoKr, arXiv 2309.14859 (LyCORIS). LoKr's alpha has
the same meaning as in ComfyUI. All forms are computed in float32, in the layout of the file. `values` gives
the rows of ΔW that a `Target` names; all axes but the first are flattened.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from .layout import Target

Read = Callable[[str], np.ndarray]


@dataclass(frozen=True)
class LowRank:
    """`factor · up @ down`. Kernels are matrices, with all axes but the first flattened."""

    read: Read
    down: str
    up: str
    factor: float
    shape: tuple[int, int]

    def values(self, target: Target) -> np.ndarray:
        up, down = (matrix(self.read(key)) for key in (self.up, self.down))
        return (target.take(up) * np.float32(self.factor)) @ down


@dataclass(frozen=True)
class Hadamard:
    """`factor · (w1_a @ w1_b) ∘ (w2_a @ w2_b)`."""

    read: Read
    keys: tuple[str, str, str, str]
    factor: float
    shape: tuple[int, int]

    def values(self, target: Target) -> np.ndarray:
        a1, b1, a2, b2 = (matrix(self.read(key)) for key in self.keys)
        return (target.take(a1) * np.float32(self.factor) @ b1) * (target.take(a2) @ b2)


@dataclass(frozen=True)
class Kronecker:
    """`factor · w1 ⊗ w2`. Each of them may be a product of two matrices."""

    read: Read
    left: tuple[str, ...]
    right: tuple[str, ...]
    factor: float
    shape: tuple[int, int]

    def values(self, target: Target) -> np.ndarray:
        left, right = (self._product(keys) for keys in (self.left, self.right))
        return target.take(np.kron(left * np.float32(self.factor), right))

    def _product(self, keys: tuple[str, ...]) -> np.ndarray:
        first, *second = (matrix(self.read(key)) for key in keys)
        return first @ second[0] if second else first


@dataclass(frozen=True)
class Whole:
    """ΔW itself."""

    read: Read
    key: str
    shape: tuple[int, ...]

    def values(self, target: Target) -> np.ndarray:
        return target.take(matrix(self.read(self.key)))


Form = LowRank | Hadamard | Kronecker | Whole


def matrix(array: np.ndarray) -> np.ndarray:
    """`array` in float32 as a matrix: all axes but the first are flattened."""
    return np.asarray(array, np.float32).reshape(len(array) if array.ndim else 1, -1)


def flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of the result of `matrix` for an array of `shape`."""
    return (shape[0] if shape else 1), prod(shape[1:])
