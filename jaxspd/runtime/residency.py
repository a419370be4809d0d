"""What stays on the device between uses, where there is room: the one place that decides."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax

from jaxspd.runtime.memory import host_memory
from jaxspd.target import Target

# This share of the memory stays free: for activations, for decoding, and for files that are read.
FREE = 1 / 4


class Residency:
    """The weights of one generator's components, beside its transformer.

    What is needed once is not kept: of what may be `streamed` each layer's weights come from their file when
    its turn is near, the first time; if it is used again, they stay wherever there is room. `offload` says
    otherwise: True streams every time, False keeps from the first. `to_come` is how many bytes are spoken for
    by weights that are still being read, or by work. All of them work on the device of `target`.
    """

    def __init__(self, offload: bool | None = None, target: Target | None = None):
        self.offload, self.to_come, self.target = offload, 0, target or Target()
        self._all: list[Weights] = []

    def weights(self, name: str, stored: Any, streamed: bool = False) -> "Weights":
        """The weights of the component called `name`, a tree of what can be fetched."""
        weights = Weights(name, stored, streamed, self)
        self._all.append(weights)
        return weights

    def forget(self, weights: "Weights") -> None:
        """Gives up weights that nothing will use any more."""
        self._all.remove(weights)

    def places(self) -> dict[str, str]:
        """Component -> "host" or "device", for those in memory."""
        place = "host" if self.target.device.platform == "cpu" else "device"
        return {weights.name: place for weights in self._all if weights.held is not None}

    def has_room(self, size: int) -> bool:
        """Whether `size` bytes more may stay in memory."""
        available, total = device_memory(self.target.device)
        return available - size - self.to_come >= FREE * total

    def has_host_room(self, size: int) -> bool:
        """Whether `size` bytes more may stay in the host's memory."""
        available, total = host_memory()
        return available - size - self.to_come >= FREE * total

    def leave(self, needed: int) -> None:
        """Gives up what is held unless the device has room for work that takes `needed` bytes in all, with
        what it works on.
        """
        held = sum(weights.size for weights in self._all if weights.held is not None)
        if held and needed + held > device_memory(self.target.device)[1]:
            for weights in self._all:
                weights.held = None


class Weights:
    """The weights of a component: in their files, or in memory. `stored` is a tree whose leaves have a shape,
    a dtype and `fetch()`, which reads one and puts it on the device.
    """

    def __init__(self, name: str, stored: Any, streamed: bool, residency: Residency):
        self.name, self.stored, self.streamed = name, stored, streamed
        self.held, self._residency, self._used = None, residency, False
        self.size = sum(leaf.nbytes for leaf in jax.tree.leaves(stored))

    def __call__(self) -> Any:
        """The tree for one use: of arrays, or where they are not to stay, of what is streamed."""
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
        """`user`, whose `parameters` are the loaded weights meanwhile."""
        empty, user.parameters = user.parameters, self()
        try:
            yield user
        finally:
            user.parameters = empty


def device_memory(device: jax.Device) -> tuple[int, int]:
    """Bytes that are available and there are in all, for JAX on `device`; on a CPU, of the host's memory. A
    device that does not tell has none to spare.
    """
    if device.platform == "cpu":
        return host_memory()
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit", 0)
    return limit - stats.get("bytes_in_use", 0), limit
