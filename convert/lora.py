"""Merges LoRAs into weights while these are read. Says what each file adds to which tensor, in diffusers'
names.

A file is read in its own names. Its ΔW is treated as the weight that it belongs to (`layout.Target`): parts
that are fused in the file are cut, and swapped halves are swapped back. All names and shapes are checked
before any weight is read.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from .copying import copy
from .errors import UsageError
from .identify import three
from .layout import Target
from .layouts import LAYOUTS, TITLES
from .lora_file import LoraFile, Module
from .lora_forms import Form, flat
from .lora_layers import names_of
from .table import Rule

# Tensors with more numbers than this are merged one at a time, since merging needs a float32 copy.
LARGE = 1 << 26
# Parts of the names of layers that only Wan's image-to-video models have.
IMAGE_TO_VIDEO = ("k_img", "v_img", "img_emb", "add_k_proj", "add_v_proj")


class Change(NamedTuple):
    """What one file adds to a tensor: the rows `target` of `form`, times `strength`."""

    form: Form
    target: Target
    strength: float


Changes = Mapping[str, Sequence[Change]]
Found = tuple[str, tuple[Target, ...]] | None


@dataclass(frozen=True)
class Model:
    """A model into which LoRAs are merged.

    `find` gives the layout and the targets of a layer's tensor. `modules` gives the layers in a file that
    belong to this model, with their names. `family` is set for transformers only.
    """

    title: str
    keys: set[str]
    shape: Callable[[str], tuple[int, ...]]
    find: Callable[[str, str], Found]
    modules: Callable[[LoraFile], list[tuple[str, Module]]]
    family: str | None = None


def transformer(family: str, tensors: Any, rules: Iterable[Rule] = ()) -> Model:
    """The `Model` of a transformer of `family`. `tensors` read like a `Checkpoint`."""
    return Model(
        f"this transformer of {TITLES.get(family, family)}",
        tensors.keys(),
        tensors.shape,
        names_of(family, rules).find,
        lambda file: [(module.name, module) for module in file.modules],
        family,
    )


def text_model(number: int, count: int, tensors: Any) -> Model:
    """The `Model` of text encoder `number` of a pipeline with `count` of them, counted from 1. Its layers
    have transformers' names, after any prefix.
    """
    keys = tensors.keys()
    known = {_bare(key.removesuffix(".weight")): key for key in keys if key.endswith(".weight")}

    def find(name: str, suffix: str) -> Found:
        key = known.get(_bare(name)) if suffix == "weight" else None
        return key and ("transformers", (Target(key),))

    def modules(file: LoraFile) -> list[tuple[str, Module]]:
        # Some files give FLUX.1's second encoder the number 3, because they reserve number 2.
        return [pair for n, pairs in file.text_modules.items() if min(n, count) == number for pair in pairs]

    return Model(f"text encoder {number}", keys, tensors.shape, find, modules)


def _bare(name: str) -> str:
    """A layer's name with underscores, without the names of the modules around it."""
    return re.sub(
        r"^((base_model|text_model|language_model|transformer|model)_)+", "", name.replace(".", "_")
    )


def changes(loras: Iterable[tuple[LoraFile, float]], model: Model) -> dict[str, list[Change]]:
    """The changes that `loras`, each with its strength, make to the tensors of `model`, by key. Raises
    UsageError if a tensor of a file matches no layer.
    """
    found: dict[str, list[Change]] = defaultdict(list)
    for file, strength in loras:
        if not isfinite(strength):
            raise UsageError(f"lora_scale must be a finite number, not {strength:g}")
        for form, targets in _placed(file, model):
            for target in targets:
                found[target.key].append(Change(form, target, strength))
    return dict(found)


def _placed(file: LoraFile, model: Model) -> list[tuple[Form, tuple[Target, ...]]]:
    """Each form in `file`, with the tensors that it changes. No tensor gets a form twice."""
    places, unmatched = [], []
    for name, module in model.modules(file):
        for suffix, form in module.forms:
            found = model.find(name, suffix)
            if found is None or not all(target.key in model.keys for target in found[1]):
                unmatched.append(module)
            else:
                places.append((module, form, found[1]))
    if unmatched:
        raise _unmatched(file, unmatched, model)
    for module, form, targets in places:
        _check_shape(file, module, form, targets, model)
    return [(form, targets) for _, form, targets in _once(file, places)]


def _once(file: LoraFile, places: list) -> list:
    """`places` without fused layers whose parts the file holds too. Raises UsageError if two other layers
    change the same tensor in the same way.
    """
    alone = {targets[0].key for _, _, targets in places if len(targets) == 1}
    kept = [p for p in places if len(p[2]) == 1 or not all(target.key in alone for target in p[2])]
    first: dict[tuple[str, type], Module] = {}
    for module, form, targets in kept:
        for target in targets:
            other = first.setdefault((target.key, type(form)), module)
            if other is not module:
                raise UsageError(
                    f"{file.path}: {other.name} and {module.name} are two names of one layer; keep one"
                )
    return kept


def _unmatched(file: LoraFile, modules: list[Module], model: Model) -> UsageError:
    """The error for layers that the model does not have."""
    names = three(key for module in modules for key in module.keys)

    def known(find: Callable[[str, str], Found]) -> int:
        return sum(find(m.name, suffix) is not None for m in file.modules for suffix, _ in m.forms)

    if model.family:
        title = TITLES.get(model.family, model.family)
        counts = {family: known(names_of(family).find) for family in LAYOUTS.keys() - {model.family}}
        most = max(counts.values())
        if most > known(model.find):
            others = " or ".join(sorted(TITLES[family] for family in counts if counts[family] == most))
            return UsageError(f"{file.path} is a LoRA for {others}, not for {title}; give one for that")
        if model.family == "wan" and any(part in m.name for m in modules for part in IMAGE_TO_VIDEO):
            return UsageError(
                f"{file.path} is a LoRA for Wan image-to-video ({names}); jaxspd runs Wan from text alone"
            )
    return UsageError(f"{file.path} changes layers that {model.title} does not have: {names}")


def _check_shape(file: LoraFile, module: Module, form: Form, targets: tuple[Target, ...], model: Model):
    """Raises UsageError unless the rows of `form` for each target have the shape of its tensor."""
    for target in targets:
        wanted = flat(model.shape(target.key))
        try:
            rows = target.shape(form.shape)[0]
        except UsageError:
            rows = None
        if (rows, form.shape[1]) != wanted:
            made, fits = ("×".join(map(str, shape)) for shape in (form.shape, wanted))
            raise UsageError(
                f"{file.path} does not fit {model.title}: {module.name} changes {made} "
                f"numbers, but {target.key} takes {fits}; it is for another model"
            )


class Merged:
    """The tensors of `checkpoint` with `changes` added, in float32. Reads like a `Checkpoint`.

    `keep(size)` says whether there is memory for `size` bytes. If so, a changed tensor is also kept without
    its changes. Then new `changes` need no second reading.
    """

    def __init__(self, checkpoint: Any, changes: Changes, keep: Callable[[int], bool] = lambda size: False):
        self.folder, self.config, self._checkpoint = checkpoint.folder, checkpoint.config, checkpoint
        self.changes, self._keep = changes, keep
        self._kept: dict[str, np.ndarray] = {}
        self._large = Lock()

    def keys(self) -> set[str]:
        return self._checkpoint.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._checkpoint.shape(key)

    def dtype(self, key: str) -> str:
        return "F32" if key in self.changes else self._checkpoint.dtype(key)

    def check_floats(self) -> None:
        self._checkpoint.check_floats()

    def rows(self, key: str, indices: np.ndarray) -> np.ndarray:
        """Some rows of a tensor, as from `Checkpoint.rows`. Raises UsageError if a LoRA changes the
        tensor.
        """
        if key in self.changes:
            raise UsageError(f"a LoRA changes {key}, a table that is read row by row; leave the LoRA out")
        return self._checkpoint.rows(key, indices)

    def read(self, key: str) -> np.ndarray:
        if key not in self.changes:
            return self._kept[key] if key in self._kept else self._checkpoint.read(key)
        weight = self._base(key)
        with self._large if weight.size > LARGE else nullcontext():
            total = np.empty(weight.shape, np.float32)
            copy(total, weight)
            for form, target, strength in self.changes[key]:
                total += np.float32(strength) * form.values(target).reshape(total.shape)
            return total

    def _base(self, key: str) -> np.ndarray:
        """The tensor without its changes."""
        if key in self._kept:
            return self._kept[key]
        weight = self._checkpoint.read(key)
        if self._keep(weight.nbytes):
            # A copy, since the system may drop the file's own memory.
            self._kept[key] = weight = np.array(weight)
        return weight
