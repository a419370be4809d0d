"""A function compiled layer by layer: equal layers share one program."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from jaxspd.runtime.spreading import Spreading, shaped
from jaxspd.target import Target

# JAX's name for host memory that a device can copy from by itself.
HOST = "pinned_host"
# A jitted function with this name is a layer.
LAYER = "transformer_layer"
# Threads that bring arguments to the device while it computes. A layer's weights are many arrays, and a
# single thread would wait for one file after another.
_FETCHING = ThreadPoolExecutor(8, "fetch")


@dataclass(frozen=True)
class Part:
    """A part of a function before it is compiled: a layer, or the equations between two layers.

    Equal layers share the computation, `closed`.
    """

    closed: ClosedJaxpr
    name: str
    inputs: Sequence[Var | Literal]
    outputs: Sequence[Var]


@dataclass(frozen=True)
class Piece:
    """A compiled part of a function.

    All values of a call lie in one list of numbered slots. `take` picks the program's inputs from that list.
    `outputs` are the slots of its results. `away` are the slots of its inputs that may lie outside the
    device. The slots `done` are not needed after it.
    """

    program: jax.stages.Compiled
    take: Callable[[list], Sequence[Any]]
    outputs: slice
    away: list[int]
    done: list[int]


class Layerwise:
    """`function`, compiled for `target` and arguments like `arguments`, which may be abstract.

    Each call of a jitted function named `LAYER` runs a program of its own, which equal layers share. The
    equations between two layers are a program too. So a layer's weights are arguments of its program, which
    no loop has to copy out of a stack first, and compile time does not grow with depth. All programs compile
    at once, in threads.

    Arguments that lie outside the device at compilation may lie there in a call too. Such an argument comes
    to the device for the program that reads it, while the program before it runs, and is dropped after it. It
    is an array in host memory, or an object with `shape`, `dtype` and a method `fetch()` that returns an
    array on the device. `fetch` is called in a thread.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, target: Target | None = None):
        self._target = target or Target()
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
        with self._target.tracing():
            closed, result = jax.make_jaxpr(function, return_shape=True)(*shapes)
        jaxpr, parts = closed.jaxpr, list(_parts(closed.jaxpr))
        self._structure = jax.tree.structure(result)
        self._count, self._constants = len(jaxpr.invars), closed.consts
        self._literals: list[jax.Array] = []
        given = [v for part in parts for v in part.outputs]
        self._variables = [*jaxpr.invars, *jaxpr.constvars, *given]
        self._slots = {variable: slot for slot, variable in enumerate(self._variables)}
        leaves = jax.tree.leaves(arguments)
        self._away = [slot for slot, leaf in enumerate(leaves) if _is_away(leaf)]
        stored = {v: getattr(leaf, "sharding", None) for v, leaf in zip(jaxpr.invars, leaves, strict=True)}
        fixed = {*jaxpr.invars, *jaxpr.constvars, *_variables(jaxpr.outvars)}
        self._spreading = Spreading(self._target, _carried(parts) - fixed, stored)
        self._pieces = self._compile(parts, jaxpr.outvars)
        self._results = [self._slot(atom) for atom in jaxpr.outvars]

    def _slot(self, atom: Var | Literal) -> int:
        """The slot of a program's input. Literals lie behind all variables."""
        if isinstance(atom, Var):
            return self._slots[atom]
        self._literals.append(atom.val)
        return len(self._variables) + len(self._literals) - 1

    def _compile(self, parts: list[Part], results: list[Var | Literal]) -> list[Piece]:
        programs, away = _programs(parts, self._spreading), {*self._away}
        kept = {*self._variables[: self._count + len(self._constants)]}
        pieces: list[Piece] = []
        later = {*_variables(results)}
        for part, program in zip(reversed(parts), reversed(programs), strict=True):
            own = _variables(part.inputs)
            done = [self._slots[v] for v in {*own, *part.outputs} if v not in later | kept]
            read = [self._slots[v] for v in own if self._slots[v] in away]
            begin = self._slots[part.outputs[0]] if part.outputs else 0
            outputs = slice(begin, begin + len(part.outputs))
            take = _taker([self._slot(atom) for atom in part.inputs])
            pieces.insert(0, Piece(program, take, outputs, read, done))
            later |= {*own}
        return pieces

    @cached_property
    def _rest(self) -> list[Any]:
        """The contents of the slots behind the arguments when a call begins.

        Constants come to the device with the first call, because the device may be absent at compilation.
        """
        given = len(self._variables) - self._count - len(self._constants)
        return [*self._target.put(self._constants), *[None] * given, *self._literals]

    @property
    def peak_bytes(self) -> int:
        """The most bytes that a call takes of each device, arguments included, as far as the compiler tells.

        This assumes that arguments lie where they lay at compilation.
        """
        sizes = [self._spreading.bytes(variable) for variable in self._variables]

        def together(slots: Iterable[int]) -> int:
            return sum(sizes[slot] for slot in slots)

        streamed = [together(piece.away) for piece in self._pieces]
        peak = live = sum(sizes[: self._count + len(self._constants)]) - together(self._away)
        for piece, own, following in zip(self._pieces, streamed, [*streamed[1:], 0], strict=True):
            live += sum(sizes[piece.outputs]) + own
            working = piece.program.memory_analysis()
            peak = max(peak, live + following + (working.temp_size_in_bytes if working else 0))
            live -= together(piece.done) + own
        return peak

    def __call__(self, *arguments: Any) -> Any:
        """Runs the function. Unless an argument is streamed, it returns before the results are computed."""
        values = jax.tree.leaves(arguments)
        if len(values) != self._count:
            raise ValueError(f"{len(values)} arrays are given, {self._count} are wanted")
        away = {slot: values[slot] for slot in self._away if _is_away(values[slot])}
        values += self._rest
        if away:
            self._stream(values, away)
        else:
            for piece in self._pieces:
                values[piece.outputs] = piece.program(*piece.take(values))
                for slot in piece.done:
                    values[slot] = None
        return jax.tree.unflatten(self._structure, [values[slot] for slot in self._results])

    def _stream(self, values: list[Any], away: dict[int, Any]) -> None:
        """Runs the pieces on `values`; those in `away` come to the device when their turn is near."""

        def fetch(slots: Iterable[int]) -> dict[int, Future]:
            return {slot: _FETCHING.submit(_fetched, away[slot]) for slot in slots if slot in away}

        for slot in away:
            values[slot] = None
        first, *rest = (*(piece.away for piece in self._pieces), self._results)
        coming = fetch(first)
        for piece, following in zip(self._pieces, rest, strict=True):
            here = [*coming]
            for slot, array in coming.items():
                values[slot] = array.result()
            coming = fetch({*following})
            values[piece.outputs] = results = piece.program(*piece.take(values))
            for slot in (*here, *piece.done):
                values[slot] = None
            # Without this, every layer would come to the device before the first has run.
            jax.block_until_ready(results)
        for slot, array in coming.items():
            values[slot] = array.result()


def _taker(slots: list[int]) -> Callable[[list], Sequence[Any]]:
    """A function that picks the values of `slots`, in order."""
    if len(slots) < 2:  # `itemgetter` returns a tuple only for two or more
        return lambda values: [values[slot] for slot in slots]
    return itemgetter(*slots)


def memory_kind(array: Any) -> str | None:
    """The kind of memory that an array, perhaps abstract, lies in, or None if it does not say."""
    return getattr(getattr(array, "sharding", None), "memory_kind", None)


def _is_away(leaf: Any) -> bool:
    return hasattr(leaf, "fetch") or memory_kind(leaf) == HOST


def _fetched(leaf: Any) -> jax.Array:
    return leaf.fetch() if hasattr(leaf, "fetch") else jax.device_put(leaf, jax.memory.Space.Device)


def _parts(jaxpr: Jaxpr) -> Iterator[Part]:
    """The parts to compile: each layer, and all equations between two layers together."""
    groups = [
        (layers, list(equations))
        for layers, equations in groupby(jaxpr.eqns, lambda e: e.params.get("name") == LAYER)
    ]
    for number, (layers, equations) in enumerate(groups):
        if layers:
            yield from (Part(e.params["jaxpr"], LAYER, e.invars, e.outvars) for e in equations)
            continue
        after = [atom for _, rest in groups[number + 1 :] for e in rest for atom in e.invars]
        given = [v for e in equations for v in e.outvars]
        inputs = [v for v in _variables(a for e in equations for a in e.invars) if v not in {*given}]
        wanted = {*_variables([*after, *jaxpr.outvars])}
        outputs = [v for v in given if v in wanted]
        part = jaxpr.replace(constvars=[], invars=inputs, outvars=outputs, eqns=equations)
        yield Part(ClosedJaxpr(part, []), "between_layers", inputs, outputs)


def _carried(parts: Iterable[Part]) -> set[Var]:
    """The arrays `[B, N, …]` that layers hand on: their results, and their inputs of the same shapes."""
    carried = set()
    for part in parts:
        if part.name == LAYER:
            shapes = {shaped(v).shape for v in part.outputs if len(shaped(v).shape) > 2}
            carried |= {v for v in _variables([*part.inputs, *part.outputs]) if shaped(v).shape in shapes}
    return carried


def _programs(parts: list[Part], spreading: Spreading) -> list[jax.stages.Compiled]:
    """The program of each part; equal parts share one.

    Equal layers usually have one jaxpr, since JAX traces them once. Otherwise their programs have the same
    text. Writing that text takes a while, so it is compared only for parts with the same inputs and outputs.
    """
    keys = [_key(part, spreading) for part in parts]
    distinct = dict(zip(keys, parts, strict=True))
    inputs = {key: key[1:] for key in distinct}
    often = Counter(inputs.values())
    with ThreadPoolExecutor(8, "compile") as pool:
        lowered = dict(zip(distinct, pool.map(spreading.lowered, distinct.values()), strict=True))
        names = {key: p.as_text() if often[inputs[key]] > 1 else key for key, p in lowered.items()}
        unequal = {names[key]: program for key, program in lowered.items()}
        compiled = {name: pool.submit(program.compile) for name, program in unequal.items()}
    return [compiled[names[key]].result() for key in keys]


def _key(part: Part, spreading: Spreading) -> tuple:
    """Parts with the same key share a program: they have the same computation, inputs and outputs."""
    given, taken = ([spreading.abstract(atom) for atom in atoms] for atoms in (part.inputs, part.outputs))
    return id(part.closed.jaxpr), *((a.shape, a.dtype, a.sharding) for a in (*given, *taken))


def _variables(atoms: Iterable[Var | Literal]) -> list[Var]:
    """Each variable once, in order."""
    return list(dict.fromkeys(a for a in atoms if isinstance(a, Var)))
