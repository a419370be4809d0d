"""A layout of a transformer's weights other than diffusers': which of diffusers' tensors each of its tensors
holds, as a table that is read both ways.

Whatever has the shape of a stored tensor goes the same way as the tensor: a LoRA's ΔW, formed in the names
that its file has, is cut and turned round by the same `Target`s as the weight. So a LoRA reads

    layout = layouts.find("flux1", "bfl")
    for target in layout.targets("double_blocks.0.img_attn.qkv.weight"):  # None: there is no such tensor
        changes[target.key] = target.take(change)                         # of to_q, to_k, to_v

and `layout.sources(keys)`, with `keys` what diffusers calls the tensors of a whole model, lists the names
that the layout has for them, among which flattened names (`double_blocks_0_img_attn_qkv`) are looked up.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .errors import UsageError

# A layer's number: the first number that is a whole part of a name. No model has a thousand layers.
NUMBER = re.compile(r"(?<=\.)[0-9]{1,3}(?=\.|$)")
# What follows a layer's name, the same in every layout.
SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class Target:
    """A tensor in diffusers' layout as rows of another: the rows are in `units` equal parts, of which `parts`
    follow one another here.
    """

    key: str
    parts: tuple[int, ...] = (0,)
    units: int = 1

    @property
    def whole(self) -> bool:
        """Whether it is the other tensor as it stands."""
        return self.parts == tuple(range(self.units))

    def rows(self, length: int) -> list[slice]:
        """Which of `length` rows, in order; UsageError if they are not in equal parts."""
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
        """Its shape, for another tensor of `shape`; UsageError as from `rows`."""
        if self.whole:
            return shape
        return (sum(rows.stop - rows.start for rows in self.rows(shape[0] if shape else 1)), *shape[1:])

    def take(self, array: np.ndarray) -> np.ndarray:
        """Its values, from those of the other tensor: a view wherever its rows lie together."""
        if self.whole:
            return array
        pieces = [array[rows] for rows in self.rows(len(array))]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclass(frozen=True)
class Line:
    """A layer of a layout, or a parameter without a layer, and the `targets` that it holds, none if nothing
    reads it. A `{}` stands for the number of a layer.
    """

    name: str
    targets: tuple[Target, ...]


def whole(name: str, target: str) -> Line:
    """The same tensor by another name."""
    return Line(name, (Target(target),))


def same(name: str) -> Line:
    """The same tensor by the same name."""
    return whole(name, name)


def split(name: str, *targets: str, shares: tuple[int, ...] = ()) -> Line:
    """Several tensors, one below the other; the rows of each are a share of all, by default an equal one."""
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
    """The same tensor with its halves the other way round: shift and scale, for scale and shift."""
    return Line(name, (Target(target, (1, 0), 2),))


def norm(name: str, target: str) -> Iterator[Line]:
    """A norm whose weight is called `scale`, as its authors have it, or `weight`, as some have written it."""
    for suffix in ("weight", "scale"):
        yield whole(f"{name}.{suffix}", f"{target}.weight")


def unread(name: str) -> Line:
    """A tensor that no model reads."""
    return Line(name, ())


@dataclass(frozen=True)
class Layout:
    """The names that a family's weights have in one kind of file. `name` is "diffusers", "bfl", …"""

    name: str
    lines: tuple[Line, ...]

    @cached_property
    def _lines(self) -> Mapping[str, Line]:
        return {line.name: line for line in self.lines}

    @cached_property
    def _origins(self) -> Mapping[str, str]:
        return {target.key: line.name for line in self.lines for target in line.targets}

    def targets(self, key: str) -> tuple[Target, ...] | None:
        """What the tensor called `key` holds of diffusers' tensors; None if the layout has no such tensor."""
        for name, suffix in _readings(key):
            for template, number in _templates(name):
                if template in self._lines:
                    return tuple(
                        Target(target.key.replace("{}", number) + suffix, target.parts, target.units)
                        for target in self._lines[template].targets
                    )
        return None

    def sources(self, keys: Iterable[str]) -> dict[str, tuple[Target, ...]]:
        """The tensors that a file of this layout has, by name, of a model whose tensors diffusers calls
        `keys`, by the authors' own names where there are several.
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
    """`key` as a parameter of its own, and as a layer's name and the suffix of its weight or bias."""
    yield key, ""
    for suffix in SUFFIXES:
        if key.endswith(suffix):
            yield key.removesuffix(suffix), suffix


def _templates(name: str) -> Iterator[tuple[str, str]]:
    """`name` as it may stand in a table, and the layer's number, if any."""
    yield name, ""
    if number := NUMBER.search(name):
        yield f"{name[: number.start()]}{{}}{name[number.end() :]}", number[0]
