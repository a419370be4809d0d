"""The weights of a transformer: in their files, on their way, or in memory; and of two that take turns."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from threading import Lock
from typing import Any

import jax
from flax import nnx

from jaxspd.convert.loader import load_parameters, quantized, refetch
from jaxspd.convert.lora import Merged, changes, transformer
from jaxspd.convert.lora_file import LoraFile
from jaxspd.convert.orbax_store import check_transformer, load_transformer, stored_transformer
from jaxspd.convert.single_file import replaced_transformer
from jaxspd.models.vae.coder import parameter_bytes
from jaxspd.runtime.memory import memory_for
from jaxspd.runtime.residency import Residency
from jaxspd.target import placed

# Files, and the strength of each.
Loras = Sequence[tuple[LoraFile, float]]


class Transformer:
    """The weights of `family`'s transformer in the folder `part`, which are to fill `parameters`. They are
    read by `pool` when they are first needed, with `loras` in them; `residency` is told of their coming.

    UsageError if the files do not fit the configuration.
    """

    def __init__(
        self,
        family,
        part: str,
        parameters: nnx.State,
        residency: Residency,
        pool: ThreadPoolExecutor,
        loras: Loras = (),
    ):
        self.family, self.part, self._parameters = family, part, parameters
        self._residency, self._pool, self._lock = residency, pool, Lock()
        self._weights = replaced_transformer(family) if part == "transformer" else None
        if loras:
            self._weights = self._merged(loras)
        check_transformer(family.folder, parameters, family.rules, self._weights, part)
        self._loading: Future | None = None
        self._ahead: Future | None = None

    @property
    def size(self) -> int:
        """Bytes of the weights in memory."""
        return parameter_bytes(self._parameters)

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory, or on their way."""
        return self._loading is not None

    @property
    def place(self) -> str:
        """Where the weights lie, or nearly all of them: "host" or "device"."""
        on_cpu = self._residency.target.device.platform == "cpu"
        return "host" if self.family.streamed or on_cpu else "device"

    def load(self) -> Future:
        """The weights, on their way or there, and the seconds that reading them took. A load that failed is
        tried again the next time, since memory that it lacked may be free by then.
        """
        with self._lock:
            if self._loading is None or (self._loading.done() and self._loading.exception()):
                if self.place == "host":
                    self._residency.to_come = self.size
                ahead, self._ahead = self._ahead, None
                self._loading = self._pool.submit(self._load, ahead)
            return self._loading

    def _load(self, ahead: Future | None):
        begin = time.perf_counter()
        family = self.family
        try:
            with memory_for(f"{family.title}'s transformer", "use dit_cpu_offload, or a smaller model"):
                if ahead is not None and not ahead.exception():
                    loaded = jax.tree.map(
                        lambda array, p: placed(array, p.sharding), ahead.result(), self._parameters
                    )
                else:
                    loaded = load_transformer(
                        family.folder, self._parameters, family.rules, self._weights, self.part, placed
                    )
                # Plain dictionaries: JAX takes them apart in a sixth of the time, and does so at every step.
                return nnx.to_pure_dict(jax.block_until_ready(loaded)), time.perf_counter() - begin
        finally:
            self._residency.to_come = 0

    def read_ahead(self) -> None:
        """Begins to read the weights into the host's memory, if there is room and the device has its own."""
        with self._lock:
            here = self.loaded or self._ahead or self.place == "host"
            if here or not self._residency.has_host_room(self.size):
                return
            self._ahead = self._pool.submit(self._read)

    def _read(self) -> nnx.State:
        stored = self._weights or stored_transformer(self.family.folder, self.family.rules, self.part)
        tensors = quantized(stored, self._parameters, self.family.rules)
        return load_parameters(tensors, self._parameters, self.family.rules, put=lambda array, _: array)

    def drop(self) -> None:
        """Gives the weights up; they are read again when they are needed."""
        with self._lock:
            self._loading = None

    def _merged(self, loras: Loras) -> Merged:
        """The files with `loras` in them."""
        family = self.family
        tensors = self._weights or stored_transformer(family.folder, family.rules, self.part)
        found = changes(loras, transformer(family.name, tensors, family.rules))
        return Merged(tensors, found, self._residency.has_host_room)

    def set_loras(self, loras: Loras) -> None:
        """Merges `loras` instead of those that were. What either change is made anew of what the files hold,
        nothing else is read; not to be called while an output is made. UsageError if one does not fit.
        """
        with self._lock:
            weights = self._weights
            if not isinstance(weights, Merged):
                weights = self._merged(loras)
                found, before = weights.changes, set()
            else:
                model = transformer(self.family.name, weights, self.family.rules)
                found, before = changes(loras, model), {*weights.changes}
            weights.changes, self._weights, self._ahead = found, weights, None
            loading = self._loading
            if loading is None or (loading.done() and loading.exception()):
                return
            loaded, _ = loading.result()
            try:
                fetched = refetch(weights, self._parameters, self.family.rules, before | found.keys(), placed)
                for path, array in fetched:
                    *parents, name = path
                    place = loaded
                    for parent in parents:
                        place = place[parent]
                    place[name] = array
            except BaseException:
                self._loading = None  # some are changed and some are not: all are to be read again
                raise


class Turns:
    """Transformers that take turns, of one shape. All stay in memory where a quarter of it is left free
    beside them, and those that are not at work are read meanwhile. Elsewhere only the one at work is on the
    device, and the next is read into the host's memory where there is room.
    """

    def __init__(self, transformers: Sequence[Transformer], residency: Residency):
        self._all, self._residency = transformers, residency
        self._together: bool | None = None
        self._working = Lock()

    @property
    def together(self) -> bool:
        """Whether all are to stay in memory; found out when it is first asked, before anything is read."""
        if self._together is None:
            first, *others = self._all
            size = sum(one.size for one in self._all)
            room = self._residency.has_host_room if first.place == "host" else self._residency.has_room
            self._together = not others or room(size)
        return self._together

    def alone(self):
        """A context in which nothing else may take a turn, where there is memory for one only."""
        return nullcontext() if self.together else self._working

    def load(self) -> Future:
        """The first's weights, on their way, and the seconds that this takes."""
        if not self.together:
            self._only(0)
        return self._all[0].load()

    def take(self, number: int) -> Any:
        """The weights of one, when they are there; nothing may hold another's, unless all stay."""
        if not self.together:
            self._only(number)
        weights, _ = self._all[number].load().result()
        for other in self._all[number + 1 :] + self._all[:number]:
            other.load() if self.together else other.read_ahead()
        return weights

    def _only(self, number: int) -> None:
        for other in self._all[:number] + self._all[number + 1 :]:
            other.drop()
