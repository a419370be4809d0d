"""The transformer of a pipeline: its weights and its compiled programs."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspd.convert.loader import refetch
from jaxspd.convert.lora import Merged, changes, transformer
from jaxspd.convert.lora_file import LoraFile
from jaxspd.convert.orbax_store import check_transformer, load_transformer, stored_transformer
from jaxspd.convert.single_file import replaced_transformer
from jaxspd.errors import UsageError
from jaxspd.request import Request
from jaxspd.runtime.layerwise import HOST
from jaxspd.runtime.memory import memory_for
from jaxspd.runtime.residency import Residency
from jaxspd.sampling.forecast import forecasting
from jaxspd.sampling.guidance import Guided, guide
from jaxspd.sampling.programs import Programs
from jaxspd.sampling.solvers import SOLVERS
from jaxspd.spectral.plan import Plan

# Files, and the strength of each.
Loras = Sequence[tuple[LoraFile, float]]


class Denoiser:
    """What denoises the latents of `family`, in `dtype`. Weights are read when they are first needed, and
    stay: `residency` is told of their coming, and tells the target. Several threads may use it at once.

    UsageError if the weights' files do not fit the configuration, or the family is to stream its layers and
    the backend cannot.
    """

    def __init__(self, family, dtype, residency: Residency, loras: Loras = ()):
        device = residency.target.device
        if family.streamed and HOST not in (m.kind for m in device.addressable_memories()):
            raise UsageError(
                f"JAX's {device.platform} backend streams nothing from host memory; leave dit_cpu_offload out"
            )
        self.family, self._residency = family, residency
        self.parameters = family.abstract_parameters(dtype, device)
        self._weights = replaced_transformer(family)
        if loras:
            self._weights = self._merged(loras)
        check_transformer(family.folder, self.parameters, family.rules, self._weights)
        self._velocity = family.velocity_function(dtype)
        self._programs: dict[tuple[str, str, bool], Programs] = {}
        self._lock, self._pool = Lock(), ThreadPoolExecutor(1, "load")
        self._loading: Future | None = None

    def load(self) -> Future:
        """The weights, on their way or there, and the seconds that reading them took. A load that failed is
        tried again the next time, since memory that it lacked may be free by then.
        """
        with self._lock:
            if self._loading is None or (self._loading.done() and self._loading.exception()):
                if self.place == "host":
                    leaves = jax.tree.leaves(self.parameters)
                    self._residency.to_come = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
                self._loading = self._pool.submit(self._load)
            return self._loading

    def _load(self):
        begin = time.perf_counter()
        try:
            with memory_for(f"{self.family.title}'s transformer", "use dit_cpu_offload, or a smaller model"):
                loaded = load_transformer(
                    self.family.folder, self.parameters, self.family.rules, self._weights
                )
                # Plain dictionaries: JAX takes them apart in a sixth of the time, and does so at every step.
                return nnx.to_pure_dict(jax.block_until_ready(loaded)), time.perf_counter() - begin
        finally:
            self._residency.to_come = 0

    def _merged(self, loras: Loras) -> Merged:
        """The transformer's files with `loras` in them."""
        tensors = self._weights or stored_transformer(self.family.folder, self.family.rules)
        found = changes(loras, transformer(self.family.name, tensors, self.family.rules))
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
            weights.changes, self._weights = found, weights
            loading = self._loading
            if loading is None or (loading.done() and loading.exception()):
                return
            loaded, _ = loading.result()
            try:
                fetched = refetch(weights, self.parameters, self.family.rules, before | found.keys())
                for path, array in fetched:
                    *parents, name = path
                    place = loaded
                    for parent in parents:
                        place = place[parent]
                    place[name] = array
            except BaseException:
                self._loading = None  # some are changed and some are not: all are to be read again
                raise

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory, or on their way."""
        return self._loading is not None

    @property
    def place(self) -> str:
        """Where the weights lie, or nearly all of them: "host" or "device"."""
        on_cpu = self._residency.target.device.platform == "cpu"
        return "host" if self.family.streamed or on_cpu else "device"

    def programs(self, request: Request) -> Programs:
        """The compiled programs that the solver and the grid asked for share."""
        solver, combine = SOLVERS[request.scheduler], self.family.combine
        key = request.scheduler, request.progressive_grid, request.forecast is not None
        with self._lock:
            if key not in self._programs:
                self._programs[key] = Programs(
                    guide(self._velocity, combine, batched=True),
                    solver if request.forecast is None else forecasting(solver),
                    guide(self._velocity, combine, batched=False),
                    self.family.expansions[request.progressive_grid],
                    self._residency.target,
                )
            return self._programs[key]

    def prepare(self, family, request: Request, plan: Plan) -> tuple[Programs, list[Future], int]:
        """Starts compiling what `plan` needs, where `family` reads as much text as is asked for. Gives the
        programs, those to wait for, and how many of them are new steps.
        """
        programs = self.programs(request)
        before = programs.compiled_steps
        one = conditioning = family.abstract_conditioning(1)
        if family.guided(request.guidance_scale):
            conditioning = Guided(one, one, jax.ShapeDtypeStruct((1,), jnp.float32))
        shape = (1, *family.leading(request.num_frames))
        prepared = programs.prepare(plan, shape, self.parameters, conditioning)
        return programs, prepared, programs.compiled_steps - before
