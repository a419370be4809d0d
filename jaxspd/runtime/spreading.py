"""The layout, over a target's devices, of the arrays between a function's programs."""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, Var, jaxpr_as_fun
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxspd.target import Target, layout, ways


def shaped(atom: Var | Literal) -> Any:
    """The shape and the dtype of `atom`: no value here is anything but an array."""
    return atom.aval


class Spreading:
    """The layout of the arrays between the programs for `target`.

    `carried` are the arrays `[B, N, …]` that one layer hands to the next. They are spread over the devices,
    with N padded to a multiple of the number of devices. Each program removes the padding from its inputs and
    adds it to its results, so models know nothing of it. `stored` gives the arguments' shardings. Each
    program gathers the sharded arguments that it reads (fully sharded data parallelism, arXiv 2304.11277).
    All other arrays are whole on every device.
    """

    def __init__(self, target: Target, carried: Iterable[Var], stored: Mapping[Var, Sharding | None]):
        self.target = target
        self._layouts: dict[Var, PartitionSpec] = {}
        self._sharded: dict[Var, PartitionSpec] = {}
        if target.mesh is None:
            return
        with target.tracing():
            found = {v: layout(shaped(v).shape[0]) for v in carried}
            self._layouts = {v: spec for v, spec in found.items() if spec is not None}
            self._filled = {v: self._fill(v) for v in self._layouts}
        self._sharded = {
            v: place.spec
            for v, place in stored.items()
            if isinstance(place, NamedSharding) and not place.is_fully_replicated
        }

    def _fill(self, variable: Var) -> tuple[int, ...]:
        """The padded shape of a spread variable between programs."""
        batch, tokens, *rest = shaped(variable).shape
        devices = ways(self._layouts[variable][1])
        return batch, -(-tokens // devices) * devices, *rest

    def abstract(self, atom: Var | Literal) -> jax.ShapeDtypeStruct:
        """The shape, dtype and sharding of `atom` between programs."""
        aval, place = shaped(atom), self.target.everywhere
        shape = aval.shape
        if isinstance(atom, Var):
            if atom in self._layouts:
                shape, place = self._filled[atom], self.target.sharding(self._layouts[atom])
            elif atom in self._sharded:
                place = self.target.sharding(self._sharded[atom])
        return jax.ShapeDtypeStruct(shape, aval.dtype, sharding=place)

    def bytes(self, variable: Var) -> int:
        """The bytes that a variable takes on each device."""
        lies = self.abstract(variable)
        return prod(lies.sharding.shard_shape(lies.shape)) * lies.dtype.itemsize

    def lowered(self, part: Any) -> jax.stages.Lowered:
        """The lowered program of a `runtime.layerwise.Part`, ready to compile."""
        function = jaxpr_as_fun(part.closed)
        arguments = [self.abstract(atom) for atom in part.inputs]
        if self.target.mesh is None:
            function.__name__ = part.name  # the name that profiles show
            return jax.jit(function).lower(*arguments)

        def spread(*values: jax.Array) -> list[jax.Array]:
            results = function(*map(self._taken, part.inputs, values))
            return [self._given(*pair) for pair in zip(part.outputs, results, strict=True)]

        spread.__name__ = part.name
        places = [self.abstract(v).sharding for v in part.outputs]
        with self.target.tracing():
            return jax.jit(spread, out_shardings=places).lower(*arguments)

    def _taken(self, atom: Var | Literal, value: jax.Array) -> jax.Array:
        if isinstance(atom, Var):
            if atom in self._layouts:
                return value[:, : shaped(atom).shape[1]]
            if atom in self._sharded:
                return jax.lax.with_sharding_constraint(value, PartitionSpec())
        return value

    def _given(self, variable: Var, value: jax.Array) -> jax.Array:
        if variable not in self._layouts:
            return value
        missing = self._filled[variable][1] - value.shape[1]
        return jnp.pad(value, [(0, 0), (0, missing)] + [(0, 0)] * (value.ndim - 2))
