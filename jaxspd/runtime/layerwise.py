"""A function compiled layer by layer: one program serves all layers alike."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from math import prod
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var, jaxpr_as_fun

from jaxspd.target import Target

# The host's memory that a device can copy from by itself, as JAX calls it.
HOST = "pinned_host"
# The name of the jitted functions that are layers, by which they are known.
LAYER = "transformer_layer"
# Threads that bring arguments to the device while it is at work: the weights of a layer are many arrays, and
# one alone waits for its file.
_FETCHING = ThreadPoolExecutor(8, "fetch")


@dataclass(frozen=True)
class Part:
    """A piece of a function before it is compiled; layers alike share `closed`."""

    closed: ClosedJaxpr
    name: str
    inputs: list[Var | Literal]
    outputs: list[Var]


@dataclass(frozen=True)
class Piece:
    """A compiled part of a function: what it reads and gives, the arguments among what it reads, and what may
    be dropped after it.
    """

    program: jax.stages.Compiled
    inputs: list[Var | Literal]
    outputs: list[Var]
    arguments: list[Var]
    done: list[Var]


class Layerwise:
    """`function`, compiled for `target` and arguments like `arguments`, which may be abstract.

    Each call of a jitted function named `LAYER` is a run of one program, the same for all layers alike; what
    lies between them are others. So a layer's weights are arguments of its program, which no loop has to copy
    out of a stack first, and compile time does not grow with depth. Programs compile in threads, all at once.

    Arguments of a call that lie elsewhere come to the device for the piece that reads them, while the one
    before it is at work, and are dropped after it: arrays in host memory, and whatever has `shape`, `dtype`
    and a method `fetch()` that gives an array on the device, which is called in a thread.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, target: Target | None = None):
        self._target = target or Target()
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
        with self._target.tracing():
            closed, result = jax.make_jaxpr(function, return_shape=True)(*shapes)
        self._arguments, self._results = closed.jaxpr.invars, closed.jaxpr.outvars
        self._structure = jax.tree.structure(result)
        self._given = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        self._pieces = self._compile(list(_parts(closed.jaxpr)))
        # As far as is known before a call.
        leaves = zip(self._arguments, jax.tree.leaves(arguments), strict=True)
        self._streamed = {variable for variable, leaf in leaves if _is_away(leaf)}

    def _compile(self, parts: list[Part]) -> list[Piece]:
        programs = _programs(parts, self._target)
        arguments = {*self._arguments}
        kept = arguments | {*self._given}
        pieces, later = [], {*_variables(self._results)}
        for part, program in zip(reversed(parts), reversed(programs), strict=True):
            own = _variables(part.inputs)
            done = [v for v in {*own, *part.outputs} if v not in later | kept]
            read = [v for v in own if v in arguments]
            pieces.insert(0, Piece(program, part.inputs, part.outputs, read, done))
            later |= {*own}
        return pieces

    @cached_property
    def _constants(self) -> dict[Var, jax.Array]:
        """On the device, since the first call: to compile for one, it need not be there."""
        return {v: jax.device_put(value, self._target.device) for v, value in self._given.items()}

    @property
    def peak_bytes(self) -> int:
        """Bytes that a call takes of the device at most, arguments included, as far as the compiler tells, if
        they lie where those did that were given at first.
        """
        streamed = [_bytes(v for v in p.arguments if v in self._streamed) for p in self._pieces]
        peak = live = _bytes({*self._arguments, *self._given} - self._streamed)
        for piece, own, following in zip(self._pieces, streamed, [*streamed[1:], 0], strict=True):
            live += _bytes(piece.outputs) + own
            working = piece.program.memory_analysis()
            peak = max(peak, live + following + (working.temp_size_in_bytes if working else 0))
            live -= _bytes(piece.done) + own
        return peak

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns. Unless something is streamed, it is still being computed by then."""
        values = dict(zip(self._arguments, jax.tree.leaves(arguments), strict=True))
        away = {v: values.pop(v) for v in self._arguments if _is_away(values[v])}
        values |= self._constants

        def fetch(variables: Iterable[Var]) -> dict[Var, Future]:
            return {v: _FETCHING.submit(_fetched, away[v]) for v in variables if v in away}

        def read(atom: Var | Literal) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        first, *rest = (*(piece.arguments for piece in self._pieces), _variables(self._results))
        coming = fetch(first)
        for piece, following in zip(self._pieces, rest, strict=True):
            here = [*coming]
            values |= {v: array.result() for v, array in coming.items()}
            coming = fetch(following)
            results = piece.program(*map(read, piece.inputs))
            values.update(zip(piece.outputs, results, strict=True))
            for v in (*here, *piece.done):
                del values[v]
            if away:
                # Else every layer would come to the device before the first has run.
                jax.block_until_ready(results)
        values |= {v: array.result() for v, array in coming.items()}
        return jax.tree.unflatten(self._structure, map(read, self._results))


def memory_kind(array: Any) -> str | None:
    """The memory that an array lies in, or that an abstract one is for, if it says."""
    return getattr(getattr(array, "sharding", None), "memory_kind", None)


def _is_away(leaf: Any) -> bool:
    return hasattr(leaf, "fetch") or memory_kind(leaf) == HOST


def _fetched(leaf: Any) -> jax.Array:
    return leaf.fetch() if hasattr(leaf, "fetch") else jax.device_put(leaf, jax.memory.Space.Device)


def _parts(jaxpr: Jaxpr) -> Iterator[Part]:
    """What to compile: each layer by itself, and all that lies between two of them together."""
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


def _programs(parts: list[Part], target: Target) -> list[jax.stages.Compiled]:
    """The program of each part, compiled once for all that are equal.

    Layers alike have one jaxpr, since JAX traces them once. Where they have not, their programs read alike;
    those are read only where two parts want the same inputs, since that takes a while.
    """
    distinct = {id(part.closed.jaxpr): part for part in parts}
    inputs = {key: tuple(part.closed.in_avals) for key, part in distinct.items()}
    often = Counter(inputs.values())
    with ThreadPoolExecutor(8, "compile") as pool:
        lowered = dict(zip(distinct, pool.map(partial(_lowered, target), distinct.values()), strict=True))
        names = {key: p.as_text() if often[inputs[key]] > 1 else key for key, p in lowered.items()}
        unequal = {names[key]: program for key, program in lowered.items()}
        compiled = {name: pool.submit(program.compile) for name, program in unequal.items()}
    return [compiled[names[id(part.closed.jaxpr)]].result() for part in parts]


def _lowered(target: Target, part: Part) -> jax.stages.Lowered:
    function = jaxpr_as_fun(part.closed)
    function.__name__ = part.name  # as profiles show it
    return jax.jit(function).lower(*target.abstract(part.closed.in_avals))


def _variables(atoms: Iterable[Var | Literal]) -> list[Var]:
    """Each variable once, in order."""
    return list(dict.fromkeys(a for a in atoms if isinstance(a, Var)))


def _bytes(variables: Iterable[Var]) -> int:
    return sum(prod(v.aval.shape) * v.aval.dtype.itemsize for v in variables)
