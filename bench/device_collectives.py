"""Counts what each device of a program sends and multiplies, from the compiler's text (HLO)."""

import re
from collections import Counter
from collections.abc import Iterable
from math import prod

BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+fn)?)\[([\d,]*)\]")
COLLECTIVE = re.compile(
    r"= (?P<shape>\S.*?) (?P<kind>all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(?P<start>-start)?\("
)
GROUPS = re.compile(
    r"replica_groups=(?:\{\{(?P<first>[\d,]+)\}|\[\d+,(?P<size>\d+)\]<="
    r"|mesh\[(?P<mesh>[^\]]*)\] \{(?P<axes>[^}]*)\})"
)
DEFINED = re.compile(r"%([\w.-]+) = ([a-z0-9]+\[[\d,]*\])")
DOT = re.compile(r"= (\S+) dot\(%([\w.-]+), %[\w.-]+\), .*?lhs_contracting_dims=\{([\d,]*)\}")
# cuDNN's attention: queries and keys are `[B, N, heads, head_dim]`.
ATTENTION = re.compile(r'custom_call_target="__cudnn\$fmha[^"]*", operand_layout_constraints=\{(\S+) (\S+)')


def sent(text: str) -> tuple[Counter[str], Counter[str]]:
    """The bytes that each device sends to others in one run, and the numbers of collectives, both by kind.

    The bytes are at least those. Raises ValueError for groups that are not understood, and for a collective
    in a loop, whose turns are not counted.
    """
    bytes_, often, looped = Counter(), Counter(), set(re.findall(r"body=%([\w.-]+)", text))
    within = ""
    for line in text.splitlines():
        if not line.startswith(" "):
            within = line.removeprefix("ENTRY ").lstrip("%").partition(" ")[0]
        if not (found := COLLECTIVE.search(line)):
            continue
        if within in looped:
            raise ValueError(f"a collective is in a loop: {line.strip()[:200]}")
        kind, size = found["kind"], sum(map(_size, SHAPE.findall(found["shape"])))
        often[kind] += 1
        bytes_[kind] += _sent(kind, size, _devices(kind, line), found["start"])
    return bytes_, often


def _sent(kind: str, size: int, devices: int, begun: str | None) -> int:
    """The bytes that a device sends in a collective of `devices` devices.

    `size` is the bytes of the results. If the collective is only `begun`, they include its arguments, except
    for an all-reduce.
    """
    others = devices - 1
    if kind == "all-reduce":
        return 2 * size * others // devices
    if kind == "all-gather":
        return (size // (devices + 1) if begun else size // devices) * others
    if kind == "reduce-scatter":
        return (size // (devices + 1) if begun else size) * others
    given = size // 2 if begun else size
    return given if kind == "collective-permute" else given * others // devices


def _devices(kind: str, line: str) -> int:
    """The number of devices that exchange data with each other."""
    if kind == "collective-permute":
        return 2
    if not (groups := GROUPS.search(line)):
        raise ValueError(f"groups of devices are not understood: {line.strip()[:300]}")
    if groups["first"]:
        return len(groups["first"].split(","))
    if groups["size"]:
        return int(groups["size"])
    axes = dict(re.findall(r"'(\w+)'=(\d+)", groups["mesh"]))
    return prod(int(axes[name]) for name in re.findall(r"'(\w+)'", groups["axes"]))


def _size(shape: tuple[str, str]) -> int:
    kind, axes = shape
    return BYTES[kind] * prod(_axes(axes))


def _axes(text: str) -> list[int]:
    return [int(axis) for axis in text.split(",") if axis]


def flops(text: str) -> int:
    """The FLOPs of the matrix products and of cuDNN's attention that each GPU computes."""
    shapes = {name: _axes(SHAPE.match(shape)[2]) for name, shape in DEFINED.findall(text)}
    total = 0
    for result, left, summed in DOT.findall(text):
        total += 2 * prod(_axes(SHAPE.match(result)[2])) * prod(shapes[left][axis] for axis in _axes(summed))
    for query, key in ATTENTION.findall(text):
        batch, queries, heads, head_dim = _axes(SHAPE.match(query)[2])
        total += 4 * batch * heads * queries * _axes(SHAPE.match(key)[2])[1] * head_dim
    return total


def in_all(texts: Iterable[str]) -> dict[str, dict[str, int] | int]:
    """The totals of programs that run in a row: a device's bytes sent, its collectives and its FLOPs."""
    bytes_, often, multiplied, known = Counter(), Counter(), 0, {}
    for text in texts:
        if text not in known:
            known[text] = (*sent(text), flops(text))
        sizes, counts, products = known[text]
        bytes_, often, multiplied = bytes_ + sizes, often + counts, multiplied + products
    return {"sent": dict(bytes_), "collectives": dict(often), "device_flops": multiplied}
