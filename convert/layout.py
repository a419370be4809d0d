"""A layout of a transformer's weights: a table of which of diffusers' tensors each stored tensor holds. The
table works in both directions.

An array with the shape of a stored tensor is treated as that tensor. For example, a LoRA's ΔW is computed in
the file's layout; then the `Target`s of the weight cut it and swap its halves:

    layout = layouts.find("flux1", "bfl")
    for target in layout.targets("double_blocks.0.img_attn.qkv.weight"):  # None: there is no such tensor
        changes[target.key] = target.take(change)                         # of to_q, to_k, to_v

`layout.sources(keys)` lists the layout's names for a whole model, whose tensors diffusers calls `keys`.
Flattened names (`double_blocks_0_img_attn_qkv`) are looked up in this list.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .errors import UsageError

# The layer's number is the first number that is a whole part of a name. No model has a thousand layers.
NUMBER = re.compile(r"(?<=\.)[0-9]{1,3}(?=\.|$)")
# Endings after a layer's name, which are the same in every layout.
SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class Target:
    """A tensor in diffusers' layout as rows of a tensor in another layout.

    The rows of the other tensor are in `units` equal parts; this tensor consists of those numbered `parts`,
    in this order.
    """

    key: str
    parts: tuple[int, ...] = (0,)
    units: int = 1

    @property
    def whole(self) -> bool:
        """Whether it is the whole other tensor, unchanged."""
        return self.parts == tuple(range(self.units))

    def rows(self, length: int) -> list[slice]:
        """Its slices of `length` rows of the other tensor, in order. Raises UsageError if `units` does not
        divide `length`.
        """
        size, rest = divmod(length, self.units)
        if rest:
            raise UsageError(f"{self.key} is a part of {length} rows, which are not {self.units} equal parts")
        slices: list[slice] = []
        for part in self.parts:
            if slices and slices[-1].stop == part * size:
                slices[-1] = slice(slices[-1].start, (part + 1) * size)
            else:
                slices.append(slice(part * size, (part + 1) * size))
        return slices

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape if the other tensor has the shape `shape`. Raises UsageError as `rows` does."""
        if self.whole:
            return shape
        return (sum(rows.stop - rows.start for rows in self.rows(shape[0] if shape else 1)), *shape[1:])

    def take(self, array: np.ndarray) -> np.ndarray:
        """Its values, from the other tensor's `array`; a view if its rows are contiguous."""
        if self.whole:
            return array
        pieces = [array[rows] for rows in self.rows(len(array))]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclass(frozen=True)
class Line:
    """A layer of a layout, or a parameter without a layer, and the `targets` that it holds. It has no targets
    if nothing reads it. `{}` stands for the number of a layer.
    """

    name: str
    targets: tuple[Target, ...]


def whole(name: str, target: str) -> Line:
    """A tensor that only has another name."""
    return Line(name, (Target(target),))


def same(name: str) -> Line:
    """A tensor with the same name."""
    return whole(name, name)


def split(name: str, *targets: str, shares: tuple[int, ...] = ()) -> Line:
    """A tensor that holds several tensors, one after another along the rows. `shares` are proportional to
    their numbers of rows; by default all are equal.
    """
    shares = shares or (1,) * len(targets)
    starts = [sum(shares[:number]) for number in range(len(shares))]
    return Line(
        name,
        tuple(
            Target(key, tuple(range(start, start + share)), sum(shares))
            for key, start, share in zip(targets, starts, shares, strict=True)
        ),
    )


def swap(name: str, target: str) -> Line:
    """A tensor whose halves are in the other order: shift and scale instead of scale and shift."""
    return Line(name, (Target(target, (1, 0), 2),))


def norm(name: str, target: str) -> Iterator[Line]:
    """A norm whose weight is called `scale`, as by its authors, or `weight`, as in some files."""
    for suffix in ("weight", "scale"):
        yield whole(f"{name}.{suffix}", f"{target}.weight")


def unread(name: str) -> Line:
    """A tensor that no model reads."""
    return Line(name, ())


@dataclass(frozen=True)
class Layout:
    """The names that a family's weights have in one kind of file. `name` is "diffusers", "bfl", …."""

    name: str
    lines: tuple[Line, ...]

    @cached_property
    def _lines(self) -> Mapping[str, Line]:
        return {line.name: line for line in self.lines}

    @cached_property
    def _origins(self) -> Mapping[str, str]:
        return {target.key: line.name for line in self.lines for target in line.targets}

    def targets(self, key: str) -> tuple[Target, ...] | None:
        """The tensors of diffusers that the tensor `key` holds. None if the layout has no such tensor."""
        for name, suffix in _readings(key):
            for template, number in _templates(name):
                if template in self._lines:
                    return tuple(
                        Target(target.key.replace("{}", number) + suffix, target.parts, target.units)
                        for target in self._lines[template].targets
                    )
        return None

    def sources(self, keys: Iterable[str]) -> dict[str, tuple[Target, ...]]:
        """The tensors of this layout, by name, that hold the tensors which diffusers calls `keys`. If a
        tensor has several names, the authors' own is used.
        """
        found: dict[str, tuple[Target, ...]] = {}
        for key in keys:
            for name, suffix in _readings(key):
                for template, number in _templates(name):
                    if template in self._origins:
                        source = self._origins[template].replace("{}", number)
                        found[source + suffix] = self.targets(source + suffix) or ()
        return found


def _readings(key: str) -> Iterator[tuple[str, str]]:
    """`key` read in two ways: as a parameter's name, and as a layer's name with the suffix of its weight or
    bias.
    """
    yield key, ""
    for suffix in SUFFIXES:
        if key.endswith(suffix):
            yield key.removesuffix(suffix), suffix


def _templates(name: str) -> Iterator[tuple[str, str]]:
    """Forms of `name` that a table may hold, each with the layer's number, or "" if there is none."""
    yield name, ""
    if number := NUMBER.search(name):
        yield f"{name[: number.start()]}{{}}{name[number.end() :]}", number[0]
