"""A function compiled layer by layer: one program serves all layers alike."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var, jaxpr_as_fun

# The host's memory that a device can copy from by itself, as JAX calls it.
HOST = "pinned_host"
# The name of the jitted functions that are layers, by which they are known.
LAYER = "transformer_layer"


@dataclass(frozen=True)
class Piece:
    """A compiled part of a function: what it reads and gives, what of the first comes from the host's memory
    for it alone, and what may be dropped after it.
    """

    program: jax.stages.Compiled
    inputs: list[Var | Literal]
    outputs: list[Var]
    streamed: list[Var]
    done: list[Var]


class Layerwise:
    """`function`, compiled for arguments like `arguments`, which may be abstract.

    Each call of a jitted function named `LAYER` is a run of one program, the same for all layers alike; what
    lies between them are others. So a layer's weights are arguments of its program, which no loop has to copy
    out of a stack first, and compile time does not grow with depth. Programs compile in threads, all at once.

    Arguments that lie in host memory come to the device for the piece that reads them, while the one before
    it is at work.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
        closed, result = jax.make_jaxpr(function, return_shape=True)(*shapes)
        jaxpr = closed.jaxpr
        leaves = zip(jaxpr.invars, jax.tree.leaves(arguments), strict=True)
        self._host = [v for v, leaf in leaves if memory_kind(leaf) == HOST]
        self._arguments, self._results = jaxpr.invars, jaxpr.outvars
        self._structure = jax.tree.structure(result)
        self._constants = dict(zip(jaxpr.constvars, jax.device_put(closed.consts), strict=True))
        self._pieces = self._compile(list(_parts(jaxpr)))

    def _compile(self, parts: list[tuple]) -> list[Piece]:
        kinds = {id(closed.jaxpr): (closed, name) for closed, name, *_ in parts}
        with ThreadPoolExecutor(8, "compile") as pool:
            programs = {key: pool.submit(_compiled, *kind) for key, kind in kinds.items()}
        host, kept = {*self._host}, {*self._arguments, *self._constants}
        pieces, later = [], {*_variables(self._results)}
        for closed, _, inputs, outputs in reversed(parts):
            own = _variables(inputs)
            streamed = [v for v in own if v in host]
            done = [v for v in {*own, *outputs} if v in host or v not in later | kept]
            pieces.insert(0, Piece(programs[id(closed.jaxpr)].result(), inputs, outputs, streamed, done))
            later |= {*own}
        return pieces

    @property
    def peak_bytes(self) -> int:
        """Bytes that a call takes of the device at most, arguments included, as far as the compiler tells."""
        peak = live = _bytes({*self._arguments, *self._constants} - {*self._host})
        for piece, following in zip(self._pieces, [*self._pieces[1:], None], strict=True):
            live += _bytes(piece.outputs) + _bytes(piece.streamed)
            working = piece.program.memory_analysis()
            ahead = _bytes(following.streamed) if following else 0
            peak = max(peak, live + ahead + (working.temp_size_in_bytes if working else 0))
            live -= _bytes(piece.done)
        return peak

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns. Unless something is streamed, it is still being computed by then."""
        values = dict(zip(self._arguments, jax.tree.leaves(arguments), strict=True)) | self._constants
        host = {v: values.pop(v) for v in self._host}

        def fetch(variables: list[Var]) -> None:
            values.update({v: jax.device_put(host[v], jax.memory.Space.Device) for v in variables})

        def read(atom: Var | Literal) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        fetch(self._pieces[0].streamed)
        for number, piece in enumerate(self._pieces, 1):
            results = piece.program(*map(read, piece.inputs))
            values.update(zip(piece.outputs, results, strict=True))
            for v in piece.done:
                del values[v]
            if host and number < len(self._pieces):
                fetch(self._pieces[number].streamed)
                # Else every layer would come to the device before the first has run.
                jax.block_until_ready(results)
        return jax.tree.unflatten(self._structure, map(read, self._results))


def memory_kind(array: Any) -> str | None:
    """The memory that an array lies in, or that an abstract one is for, if it says."""
    return getattr(getattr(array, "sharding", None), "memory_kind", None)


def _parts(jaxpr: Jaxpr) -> Iterator[tuple[ClosedJaxpr, str, list[Var | Literal], list[Var]]]:
    """What to compile, a name for it, what it reads and what it gives: each layer by itself, and all that
    lies between two of them together. Layers alike have the same jaxpr, since JAX traces them once.
    """
    groups = [
        (layers, list(equations))
        for layers, equations in groupby(jaxpr.eqns, lambda e: e.params.get("name") == LAYER)
    ]
    for number, (layers, equations) in enumerate(groups):
        if layers:
            yield from ((e.params["jaxpr"], LAYER, e.invars, e.outvars) for e in equations)
            continue
        after = [atom for _, rest in groups[number + 1 :] for e in rest for atom in e.invars]
        given = [v for e in equations for v in e.outvars]
        inputs = [v for v in _variables(a for e in equations for a in e.invars) if v not in {*given}]
        wanted = {*_variables([*after, *jaxpr.outvars])}
        outputs = [v for v in given if v in wanted]
        part = jaxpr.replace(constvars=[], invars=inputs, outvars=outputs, eqns=equations)
        yield ClosedJaxpr(part, []), "between_layers", inputs, outputs


def _compiled(closed: ClosedJaxpr, name: str) -> jax.stages.Compiled:
    function = jaxpr_as_fun(closed)
    function.__name__ = name  # as profiles show it
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in closed.in_avals]
    return jax.jit(function).lower(*shapes).compile()


def _variables(atoms: Iterable[Var | Literal]) -> list[Var]:
    """Each variable once, in order."""
    return list(dict.fromkeys(a for a in atoms if isinstance(a, Var)))


def _bytes(variables: Iterable[Var]) -> int:
    return sum(prod(v.aval.shape) * v.aval.dtype.itemsize for v in variables)
