"""The weights of a transformer (in files, being read, or in memory), and of two transformers that take
turns.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from threading import Lock
from typing import Any

import jax
from flax import nnx

from jaxspd.convert.loader import load_parameters, quantized, refetch
from jaxspd.convert.lora import Changes, Merged, changes, transformer
from jaxspd.convert.lora_file import LoraFile
from jaxspd.convert.orbax_store import check_transformer, load_transformer, stored_transformer
from jaxspd.convert.single_file import Relaid, replaced_transformer
from jaxspd.models.vae.coder import parameter_bytes
from jaxspd.runtime.memory import memory_for
from jaxspd.runtime.residency import Residency
from jaxspd.target import placed

# LoRA files, each with its strength.
Loras = Sequence[tuple[LoraFile, float]]


class Transformer:
    """The weights of `family`'s transformer in the folder `part`, for the abstract `parameters`.

    `pool` reads them when they are first needed, with `loras` merged. `residency` reserves memory for them.
    Raises UsageError if the files do not fit the configuration.
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
        self._weights: Relaid | Merged | None = None
        if part == "transformer":
            self._weights = replaced_transformer(family)
        if loras:
            self._weights = self._merged(loras)
        check_transformer(family.folder, parameters, family.rules, self._weights, part)
        self._loading: Future | None = None
        self._ahead: Future | None = None

    @property
    def size(self) -> int:
        """The size of the weights in memory, in bytes."""
        return parameter_bytes(self._parameters)

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory or being read."""
        return self._loading is not None

    @property
    def place(self) -> str:
        """Where the weights, or nearly all of them, are: "host" or "device"."""
        on_cpu = self._residency.target.device.platform == "cpu"
        return "host" if self.family.streamed or on_cpu else "device"

    def load(self) -> Future:
        """Starts reading the weights, unless that is done. The future gives them and the seconds that reading
        took.

        A load that failed is tried again at the next call, since memory may be free by then.
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
                # JAX flattens plain dictionaries six times as fast, and does so at every step.
                return nnx.to_pure_dict(jax.block_until_ready(loaded)), time.perf_counter() - begin
        finally:
            self._residency.to_come = 0

    def read_ahead(self) -> None:
        """Starts reading the weights into the host's memory, if there is room and the device has its own
        memory.
        """
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
        """Frees the weights. They are read again when they are needed."""
        with self._lock:
            self._loading = None

    def _merged(self, loras: Loras) -> Merged:
        """The files' tensors with `loras` merged."""
        family = self.family
        tensors = self._weights or stored_transformer(family.folder, family.rules, self.part)
        found = changes(loras, transformer(family.name, tensors, family.rules))
        return Merged(tensors, found, self._residency.has_host_room)

    def set_loras(self, loras: Loras) -> None:
        """Merges `loras` in place of the earlier ones. Only weights that either of them changes are read
        again.

        Must not be called while an output is made. Raises UsageError if a LoRA does not fit.
        """
        with self._lock:
            found: Changes
            before: set[str] = set()
            if isinstance(self._weights, Merged):
                weights = self._weights
                model = transformer(self.family.name, weights, self.family.rules)
                found, before = changes(loras, model), {*weights.changes}
            else:
                weights = self._merged(loras)
                found = weights.changes
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
                self._loading = None  # only some weights are changed, so all must be read again
                raise


class Turns:
    """Transformers of the same shape that take turns.

    If a quarter of the memory stays free beside all of them, all stay in memory; those that are not at work
    are read meanwhile. Otherwise only the one at work is on the device, and the next one is read into the
    host's memory if there is room.
    """

    def __init__(self, transformers: Sequence[Transformer], residency: Residency):
        self._all, self._residency = [*transformers], residency
        self._together: bool | None = None
        self._working = Lock()

    @property
    def together(self) -> bool:
        """Whether all transformers stay in memory. This is decided at the first use, before any weights are
        read.
        """
        if self._together is None:
            first, *others = self._all
            size = sum(one.size for one in self._all)
            room = self._residency.has_host_room if first.place == "host" else self._residency.has_room
            self._together = not others or room(size)
        return self._together

    def alone(self):
        """A context in which no other thread may take a turn, if there is memory for one transformer only."""
        return nullcontext() if self.together else self._working

    def load(self) -> Future:
        """Starts reading the first transformer's weights. The future gives them and the seconds that reading
        took.
        """
        if not self.together:
            self._only(0)
        return self._all[0].load()

    def take(self, number: int) -> Any:
        """The weights of transformer `number`; waits until they are read. Unless all stay in memory, the
        caller must hold no other transformer's weights.
        """
        if not self.together:
            self._only(number)
        weights, _ = self._all[number].load().result()
        for other in self._all[number + 1 :] + self._all[:number]:
            other.load() if self.together else other.read_ahead()
        return weights

    def _only(self, number: int) -> None:
        for other in self._all[:number] + self._all[number + 1 :]:
            other.drop()
