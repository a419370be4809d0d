"""The one place that decides which weights stay in memory between uses."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax

from jaxspd.runtime.memory import host_memory
from jaxspd.target import Target

# The share of the memory that stays free for activations, for decoding, and for files that are read.
FREE = 1 / 4


class Residency:
    """The weights of one generator's components, except its transformer's, on the device of `target`.

    A component is loaded whole, and kept if there is room. One that may be `streamed` reads each layer's
    weights from their file when the layer's turn is near: at its first use, which may be its only one, and
    later where there is no room. `offload` overrides this for such components: True streams at every use,
    False loads and keeps from the first. `to_come` is the number of bytes reserved for weights that are still
    being read.
    """

    def __init__(self, offload: bool | None = None, target: Target | None = None):
        self.offload, self.to_come, self.target = offload, 0, target or Target()
        self._all: list[Weights] = []

    def weights(self, name: str, stored: Any, streamed: bool = False) -> "Weights":
        """Registers the component called `name`, with `stored`, `streamed` as in `Weights`."""
        weights = Weights(name, stored, streamed, self)
        self._all.append(weights)
        return weights

    def forget(self, weights: "Weights") -> None:
        """Drops weights that nothing will use any more."""
        self._all.remove(weights)

    def places(self) -> dict[str, str]:
        """For each component in memory, by name, whether that is the memory of the "host" or "device"."""
        place = "host" if self.target.device.platform == "cpu" else "device"
        return {weights.name: place for weights in self._all if weights.held is not None}

    def has_room(self, size: int) -> bool:
        """Whether `size` bytes more may stay in the device's memory."""
        available, total = device_memory(self.target.device)
        return available - size - self.to_come >= FREE * total

    def has_host_room(self, size: int) -> bool:
        """Whether `size` bytes more may stay in the host's memory."""
        available, total = host_memory()
        return available - size - self.to_come >= FREE * total

    def leave(self, needed: int) -> None:
        """Drops all held weights unless they leave room for work that takes `needed` bytes of the device.

        `needed` includes the work's arguments.
        """
        held = sum(weights.size for weights in self._all if weights.held is not None)
        if held and needed + held > device_memory(self.target.device)[1]:
            for weights in self._all:
                weights.held = None


class Weights:
    """The weights of a component: in their files, or in memory.

    `stored` is a tree whose leaves have a shape, a dtype and `fetch()`, which reads one array and puts it on
    the device. `streamed` says whether the component can take `stored` in place of arrays.
    """

    def __init__(self, name: str, stored: Any, streamed: bool, residency: Residency):
        self.name, self.stored, self.streamed = name, stored, streamed
        self.held, self._residency, self._used = None, residency, False
        self.size = sum(leaf.nbytes for leaf in jax.tree.leaves(stored))

    def __call__(self) -> Any:
        """The tree for one use: of arrays, or `stored` itself if the weights are streamed."""
        if self.held is not None:
            return self.held
        residency, again = self._residency, self._used
        self._used = True
        offload = residency.offload if self.streamed else None
        keep = residency.has_room(self.size) if offload is None else not offload
        if self.streamed and not (keep and (again or offload is False)):
            return self.stored
        leaves, tree = jax.tree.flatten(self.stored)
        with ThreadPoolExecutor(8, "load") as pool:
            loaded = jax.tree.unflatten(tree, pool.map(lambda leaf: leaf.fetch(), leaves))
        if keep:
            self.held = loaded
        return loaded

    @contextmanager
    def lent_to(self, user: Any) -> Iterator[Any]:
        """A context with `user`, in which its `parameters` are the loaded weights."""
        empty, user.parameters = user.parameters, self()
        try:
            yield user
        finally:
            user.parameters = empty


def device_memory(device: jax.Device) -> tuple[int, int]:
    """The available and the total bytes that JAX may use on `device`; on a CPU, the host's.

    Both are at most 0 for a device that does not say.
    """
    if device.platform == "cpu":
        return host_memory()
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit", 0)
    return limit - stats.get("bytes_in_use", 0), limit
