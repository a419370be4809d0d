"""What a program is made for: devices, which need not be there, and perhaps one attention backend."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

# JAX keeps what it has traced under one value apart from what it has traced under another.
_FORCED = jax.make_user_context(None)
# The axes of a mesh: a batch lies along the first, the tokens of each of its samples along the second.
SAMPLES, TOKENS = "samples", "tokens"


@dataclass(frozen=True)
class Target:
    """The device that programs run on, by default JAX's first, and the attention backend to force, a name in
    `models.attention`, or None for the best there is.

    Where there is a `mesh` of several devices, `over` makes it, the layers of a model are spread over all of
    them, and `device` is the first that this process has, for what is not. `shard_weights` says whether each
    device keeps a part of every weight only. `memory` is how many bytes each may take, if not what `device`
    tells. A device of `jax.experimental.topologies` can be compiled for where no such device is.
    """

    device: jax.Device = field(default_factory=lambda: jax.local_devices()[0])
    attention_backend: str | None = None
    mesh: Mesh | None = None
    shard_weights: bool = False
    memory: float | None = None

    def over(
        self,
        devices: Sequence[jax.Device],
        samples: int = 1,
        shard_weights: bool = False,
        memory: float | None = None,
    ) -> "Target":
        """The same for `devices`, over which `samples` of a batch are spread side by side, a divisor of their
        number.
        """
        grid = np.array(devices).reshape(samples, -1)
        mesh = Mesh(grid, (SAMPLES, TOKENS), axis_types=(AxisType.Auto,) * 2)
        own = [device for device in devices if device.process_index == jax.process_index()] or devices
        return replace(self, device=own[0], mesh=mesh, shard_weights=shard_weights, memory=memory)

    @property
    def single(self) -> "Target":
        """The same for the first device alone."""
        return replace(self, mesh=None, shard_weights=False, memory=None)

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Meanwhile, what this thread traces is for this target: `platform`, `forced_attention` and `layout`
        tell.
        """
        mesh = self.mesh or self.over([self.device]).mesh
        with jax.set_mesh(mesh), _FORCED(self.attention_backend):
            yield

    @property
    def everywhere(self) -> Sharding:
        """Where an array is that each device has whole."""
        return SingleDeviceSharding(self.device) if self.mesh is None else self.sharding(PartitionSpec())

    def sharding(self, spec: PartitionSpec, **kind: str) -> NamedSharding:
        return NamedSharding(self.mesh, spec, **kind)

    def weight(self, shape: tuple[int, ...], **kind: str) -> Sharding:
        """Where a weight of `shape` is kept: cut along its first axis that the devices divide, if weights are
        sharded. Vectors stay whole, as fetching them takes longer than they are large.
        """
        if self.mesh is None:
            return SingleDeviceSharding(self.device, **kind)
        axes = [axis for axis, size in enumerate(shape) if size % self.mesh.size == 0]
        if not (self.shard_weights and len(shape) > 1 and axes):
            return self.sharding(PartitionSpec(), **kind)
        return self.sharding(PartitionSpec(*[None] * axes[0], (SAMPLES, TOKENS)), **kind)

    def abstract(self, tree: Any) -> Any:
        """`tree`, whose leaves have a shape and a dtype, as abstract arrays that every device has whole."""
        place = self.everywhere
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)

    def put(self, tree: Any) -> Any:
        """`tree`, of arrays that the host has, on every device."""
        return jax.tree.map(lambda array: placed(array, self.everywhere), tree)

    def compile(self, function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
        """`function` of arrays like `arguments` that every device has whole, as are its results."""
        options = {} if self.mesh is None else {"out_shardings": self.everywhere}
        return jax.jit(function, **options).lower(*self.abstract(arguments)).compile()


def placed(array: Any, sharding: Sharding | None) -> jax.Array:
    """`array`, which the host has, where `sharding` says. Of devices of several processes each process fills
    its own: all are to have the same array.
    """
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)


def platform() -> str:
    """The platform of the target that is traced for, or of JAX's own default: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def forced_attention() -> str | None:
    """The attention backend that the target traced for forces, if any."""
    return _FORCED.value


def layout(batch: int) -> PartitionSpec | None:
    """How arrays `[batch, tokens, …]` lie on the devices of the target that is traced for; None on one alone.

    A batch that does not divide leaves all devices to the tokens: such is a step without guidance.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    divides = batch % mesh.shape[SAMPLES] == 0
    return PartitionSpec(SAMPLES, TOKENS) if divides else PartitionSpec(None, (SAMPLES, TOKENS))


def ways(axes: str | tuple[str, ...]) -> int:
    """The devices along `axes` of the mesh that is traced for."""
    shape = jax.sharding.get_abstract_mesh().shape
    return prod(shape[axis] for axis in ([axes] if isinstance(axes, str) else axes))


def spread(x: jax.Array) -> jax.Array:
    """`x` `[B, N, …]`, which is to be computed where `layout` has it; without this, XLA may gather tokens. Of
    `[B, D]`, a modulation, each device makes a part of the channels, which are gathered at once: else each
    vector that is split off would be.
    """
    spec = layout(len(x)) if x.ndim > 1 else None
    if spec is None:
        return x
    x = jax.lax.with_sharding_constraint(x, spec)
    return x if x.ndim > 2 else jax.lax.with_sharding_constraint(x, PartitionSpec(spec[0]))
