"""A LoRA file: its layers and the forms of their changes, from names, shapes and a few numbers."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UsageError
from .identify import three
from .lora_forms import Form, Hadamard, Kronecker, LowRank, Whole, flat
from .lora_layers import role_of, text_encoder
from .single_file import open_file, otherwise

# PEFT's settings are in the file's metadata, if diffusers wrote it, or in a file beside it.
METADATA, BESIDE = "lora_adapter_metadata", "adapter_config.json"
# Forms that do more than add to weights of linear layers.
DORA = "is a DoRA (it holds dora_scale), which rescales whole weights; jaxspd merges LoRA, LoHa and LoKr"
CONTROL = (
    "adds to biases (lora_B.bias), as FLUX.1's Canny and Depth LoRAs do, which need a picture; jaxspd works "
    "from text alone"
)
TUCKER = "holds factors of convolutions (lora_mid, lokr_t2 or hada_t1), which no transformer here has"


@dataclass
class Module:
    """A layer as the file names it.

    `roles` maps each tensor's role in the layer to its key. `forms` says what is added to which of the
    layer's tensors: "weight", "bias", or "" for a modulation.
    """

    name: str
    roles: dict[str, str] = field(default_factory=dict)
    forms: list[tuple[str, Form]] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        return sorted(self.roles.values())


class LoraFile:
    """The LoRA in a file or a folder. Headers are read at once; the only tensors that are read with them are
    alphas.

    Raises UsageError if the file is not a LoRA, lacks half of a layer's tensors, or has a form that cannot be
    merged here.
    """

    def __init__(self, path: Path):
        self.path = path
        self._tensors = open_file(path)
        found: dict[str, Module] = {}
        strangers = []
        for key in sorted(self._tensors.keys()):
            if (named := role_of(key)) is None:
                strangers.append(key)
                continue
            name, role = named
            module = found.setdefault(name, Module(name))
            if role in module.roles:
                raise UsageError(
                    f"{path}: {module.roles[role]} and {key} are two names of one tensor; keep one of them"
                )
            module.roles[role] = key
        if not any(module.roles.keys() - {"alpha"} for module in found.values()):
            raise UsageError(f"{path} is no LoRA: {otherwise(self._tensors.keys())}")
        self._refuse_forms(found)
        if strangers:
            raise UsageError(f"{path} holds tensors that are no part of a LoRA: {three(strangers)}")
        self._tensors.check_floats()
        for module in found.values():
            module.forms = list(self._forms(module))
        self._all = list(found.values())

    @cached_property
    def modules(self) -> list[Module]:
        """The layers of the transformer."""
        return [module for module in self._all if text_encoder(module.name) is None]

    @cached_property
    def text_modules(self) -> dict[int, list[tuple[str, Module]]]:
        """The layers of each text encoder with their names there, by the encoder's number in the pipeline."""
        found: dict[int, list[tuple[str, Module]]] = defaultdict(list)
        for module in self._all:
            if (named := text_encoder(module.name)) is not None:
                found[named[0]].append((named[1], module))
        return dict(found)

    def _refuse_forms(self, modules: dict[str, Module]) -> None:
        roles = {role for module in modules.values() for role in module.roles}
        for names, reason in (
            (("dora",), DORA),
            (("bias",), CONTROL),
            (("mid", "lokr_t2", "hada_t1", "hada_t2"), TUCKER),
        ):
            if roles.intersection(names):
                raise UsageError(f"{self.path} {reason}")

    def _forms(self, module: Module) -> Iterator[tuple[str, Form]]:
        """What is added to each tensor of a layer. Raises UsageError if half a form is missing."""
        has = module.roles.keys()
        told = 0
        if {"down", "up"} & has:
            yield "weight", self._low_rank(module)
            told += 1
        if any(role.startswith("hada_") for role in has):
            yield "weight", self._hadamard(module)
            told += 1
        if any(role.startswith("lokr_") for role in has):
            yield "weight", self._kronecker(module)
            told += 1
        for role, suffix in (("diff", "weight"), ("diff_b", "bias"), ("diff_m", "")):
            if role in has:
                key = module.roles[role]
                yield suffix, Whole(self._read, key, flat(self._tensors.shape(key)))
                told += 1
        if not told:
            raise self._half(module, "its factors")

    def _low_rank(self, module: Module) -> LowRank:
        down, up = self._pair(module, "down", "up", "lora_down or lora_A", "lora_up or lora_B")
        (rank, columns), (rows, width) = (flat(self._tensors.shape(key)) for key in (down, up))
        self._check_rank(module, rank, width)
        return LowRank(self._read, down, up, self._factor(module, rank), (rows, columns))

    def _hadamard(self, module: Module) -> Hadamard:
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        for name in names:
            if name not in module.roles:
                raise self._half(module, name)
        first_a, first_b, second_a, second_b = keys = [module.roles[name] for name in names]
        a1, b1, a2, b2 = (flat(self._tensors.shape(key)) for key in keys)
        self._check_rank(module, a1[1], b1[0])
        self._check_rank(module, a2[1], b2[0])
        if (a1[0], b1[1]) != (a2[0], b2[1]):
            raise UsageError(f"{self.path}: the two halves of {module.name} have different shapes")
        kept = first_a, first_b, second_a, second_b
        return Hadamard(self._read, kept, self._factor(module, b1[0]), (a1[0], b1[1]))

    def _kronecker(self, module: Module) -> Kronecker:
        sides: list[tuple[str, ...]] = []
        shapes, rank = [], None
        for name in ("lokr_w1", "lokr_w2"):
            if name in module.roles:
                keys: tuple[str, ...] = (module.roles[name],)
                shape = flat(self._tensors.shape(keys[0]))
            elif f"{name}_a" in module.roles or f"{name}_b" in module.roles:
                keys = self._pair(module, f"{name}_a", f"{name}_b", f"{name}_a", f"{name}_b")
                first, second = (flat(self._tensors.shape(key)) for key in keys)
                self._check_rank(module, first[1], second[0])
                shape, rank = (first[0], second[1]), rank or second[0]
            else:
                raise self._half(module, name)
            sides.append(keys)
            shapes.append(shape)
        # If both factors are whole matrices, alpha has no meaning.
        factor = 1.0 if rank is None else self._factor(module, rank)
        (rows, columns), (more_rows, more_columns) = shapes
        left, right = sides
        shape = rows * more_rows, columns * more_columns
        return Kronecker(self._read, left, right, factor, shape)

    def _pair(self, module: Module, one: str, other: str, *called: str) -> tuple[str, str]:
        for role, name in zip((one, other), called, strict=True):
            if role not in module.roles:
                raise self._half(module, name)
        return module.roles[one], module.roles[other]

    def _half(self, module: Module, missing: str) -> UsageError:
        return UsageError(
            f"{self.path} holds half a LoRA: {three(module.keys)} without {missing}; download it again"
        )

    def _check_rank(self, module: Module, rank: int, other: int) -> None:
        if rank != other or not rank:
            raise UsageError(
                f"{self.path}: the factors of {module.name} are of rank {rank} and {other}; download it again"
            )

    def _factor(self, module: Module, rank: int) -> float:
        """The number that multiplies the product, besides the user's strength."""
        if "alpha" not in module.roles:
            return self._adapter.factor(module.name, rank)
        key = module.roles["alpha"]
        value = np.asarray(self._read(key), np.float32).reshape(-1)
        if value.size != 1 or not isfinite(value[0]):
            raise UsageError(f"{self.path}: {key} is no finite number; download it again")
        return float(value[0]) / rank

    def _read(self, key: str) -> np.ndarray:
        return self._tensors.read(key)

    @cached_property
    def _adapter(self) -> "Adapter":
        """PEFT's settings. If they cover several components, only the transformer's are used."""
        text = self._tensors.metadata.get(METADATA)
        beside = (self.path if self.path.is_dir() else self.path.parent) / BESIDE
        if text is None and (self.path.is_dir() or self.path.name.startswith("adapter_model")):
            with suppress(OSError, UnicodeDecodeError):
                text = beside.read_text()
        settings: Any = {}
        with suppress(ValueError, RecursionError):
            settings = json.loads(text or "{}")
        if not isinstance(settings, dict):
            settings = {}
        # Diffusers puts the component's name before each setting.
        own = {key.rpartition(".")[2]: value for key, value in settings.items() if "text_enc" not in key}
        return Adapter.of(own)


@dataclass(frozen=True)
class Adapter:
    """PEFT's settings of a LoRA.

    `alpha` is for all layers, and `patterns` for layers whose names end in a pattern. If `rooted`, alpha is
    divided by the root of the rank (arXiv 2312.03732), else by the rank. Without alpha, the product is not
    scaled.
    """

    alpha: float | None = None
    patterns: tuple[tuple[str, float], ...] = ()
    rooted: bool = False

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Adapter":
        """The settings in the fields of `adapter_config.json`. Fields of a wrong type are ignored."""

        def number(value: Any) -> float | None:
            good = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
            return float(value) if good else None

        patterns = settings.get("alpha_pattern")
        pairs = patterns.items() if isinstance(patterns, dict) else ()
        return cls(
            number(settings.get("lora_alpha")),
            tuple((pattern, own) for pattern, value in pairs if (own := number(value)) is not None),
            settings.get("use_rslora") is True,
        )

    def factor(self, name: str, rank: int) -> float:
        """The factor for the layer `name`, whose rank is `rank`."""
        alpha = self.alpha
        for pattern, own in self.patterns:
            with suppress(re.error):
                if re.search(rf"(^|\.)(?:{pattern})$", name):
                    alpha = own
        if alpha is None:
            return 1.0
        return alpha / (sqrt(rank) if self.rooted else rank)
