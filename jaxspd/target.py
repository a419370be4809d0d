"""What a program is compiled for: devices, which may be absent, and perhaps one attention backend."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

# JAX caches traces separately for each value of this context.
_FORCED = jax.make_user_context(None)
# The axes of a mesh. A batch is spread along the first, and the tokens of each sample along the second.
SAMPLES, TOKENS = "samples", "tokens"


@dataclass(frozen=True)
class Target:
    """The devices that programs are compiled for.

    `device` is by default JAX's first. `attention_backend` is a name in `models.attention` to force, or None
    for the best one. `over` makes a `mesh` of several devices. The layers of a model are then spread over all
    of them, and `device`, the first one of this process, runs everything else. `shard_weights` says whether
    each device keeps only a part of every weight. `memory` is the bytes that each device may take, or None
    for what `device` itself says. A device of `jax.experimental.topologies` need not be there.
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
        """The same target over `devices`.

        Each of `samples` groups of devices takes a part of the batch. `samples` divides the number of
        devices.
        """
        grid = np.array(devices).reshape(samples, -1)
        mesh = Mesh(grid, (SAMPLES, TOKENS), axis_types=(AxisType.Auto,) * 2)
        own = [device for device in devices if device.process_index == jax.process_index()] or devices
        return replace(self, device=own[0], mesh=mesh, shard_weights=shard_weights, memory=memory)

    @property
    def single(self) -> "Target":
        """The same target for its first device alone."""
        return replace(self, mesh=None, shard_weights=False, memory=None)

    @property
    def own(self) -> "Target":
        """The same target over this process's devices alone."""
        if self.mesh is None:
            return self
        devices = [d for d in self.mesh.devices.flat if d.process_index == self.device.process_index]
        return self.over(devices) if len(devices) > 1 else self.single

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """A context in which this thread traces for this target.

        `platform`, `forced_attention` and `layout` then describe it.
        """
        mesh = self.mesh or self.over([self.device]).mesh
        with jax.set_mesh(mesh), _FORCED(self.attention_backend):
            yield

    @property
    def everywhere(self) -> Sharding:
        """The sharding of an array that each device has whole."""
        return SingleDeviceSharding(self.device) if self.mesh is None else self.sharding(PartitionSpec())

    def sharding(self, spec: PartitionSpec, **kind: str) -> NamedSharding:
        assert self.mesh is not None, "one device shards nothing"
        return NamedSharding(self.mesh, spec, **kind)

    def weight(self, shape: tuple[int, ...], **kind: str) -> Sharding:
        """The sharding of a weight of `shape`. `kind` may give its `memory_kind`.

        If weights are sharded, it is cut along its first axis that the number of devices divides. Vectors
        stay whole, since gathering them would cost more than the little memory that they take.
        """
        if self.mesh is None:
            return SingleDeviceSharding(self.device, **kind)
        axes = [axis for axis, size in enumerate(shape) if size % self.mesh.size == 0]
        if not (self.shard_weights and len(shape) > 1 and axes):
            return self.sharding(PartitionSpec(), **kind)
        return self.sharding(PartitionSpec(*[None] * axes[0], (SAMPLES, TOKENS)), **kind)

    def rows(self, shape: tuple[int, ...]) -> Sharding:
        """The sharding of maps of `shape` `[…, H, W, C]`: by rows if the devices divide these, else whole."""
        if self.mesh is None or shape[-3] % self.mesh.size:
            return self.everywhere
        return self.sharding(_by_rows(len(shape)))

    def abstract(self, tree: Any) -> Any:
        """Abstract arrays that every device has whole, for a `tree` of leaves with a shape and a dtype."""
        place = self.everywhere
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)

    def put(self, tree: Any) -> Any:
        """The host's arrays in `tree`, whole on every device."""
        return jax.tree.map(lambda array: placed(array, self.everywhere), tree)

    def compile(self, function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
        """Compiles `function` for arrays like `arguments`. These and its results are whole on all devices."""
        options: dict[str, Any] = {} if self.mesh is None else {"out_shardings": self.everywhere}
        return jax.jit(function, **options).lower(*self.abstract(arguments)).compile()


def placed(array: Any, sharding: Sharding | None) -> jax.Array:
    """The host's `array`, placed on devices as `sharding` says.

    If the devices belong to several processes, each process fills its own, and all must have the same array.
    """
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)


def platform() -> str:
    """The platform of the target of the current trace, or else JAX's default: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def forced_attention() -> str | None:
    """The attention backend that the target of the current trace forces, or None."""
    return _FORCED.value


def layout(batch: int) -> PartitionSpec | None:
    """How arrays `[batch, tokens, …]` are spread over the devices of the current trace's target.

    It is None for a single device. If the batch is not divisible, as in a step without guidance, the tokens
    are spread over all devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    divides = batch % mesh.shape[SAMPLES] == 0
    return PartitionSpec(SAMPLES, TOKENS) if divides else PartitionSpec(None, (SAMPLES, TOKENS))


def ways(axes: str | tuple[str, ...]) -> int:
    """The number of devices along `axes` of the current trace's mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return prod(shape[axis] for axis in ([axes] if isinstance(axes, str) else axes))


def spread(x: jax.Array) -> jax.Array:
    """`x` `[B, N, …]`, constrained to the spread that `layout` gives. Otherwise XLA may gather its tokens.

    Of a modulation `[B, D]` each device computes a part of the channels. They are gathered at once. Otherwise
    each vector that is split off would be gathered by itself.
    """
    spec = layout(len(x)) if x.ndim > 1 else None
    if spec is None:
        return x
    x = jax.lax.with_sharding_constraint(x, spec)
    return x if x.ndim > 2 else jax.lax.with_sharding_constraint(x, PartitionSpec(spec[0]))


def spread_rows(maps: jax.Array) -> jax.Array:
    """`maps` `[…, H, W, C]`, with their rows spread over all devices of the current trace's target.

    The rows of later maps are then spread too. XLA exchanges rows between devices if a convolution reads them
    together.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not 1 < mesh.size <= maps.shape[-3]:
        return maps
    return jax.lax.with_sharding_constraint(maps, _by_rows(maps.ndim))


def _by_rows(axes: int) -> PartitionSpec:
    return PartitionSpec(*[None] * (axes - 3), (SAMPLES, TOKENS))
