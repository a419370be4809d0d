"""The denoiser of a pipeline: one transformer or two that take turns, and the compiled programs."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

import jax
import jax.numpy as jnp

from jaxspd.components.transformer import Loras, Transformer, Turns
from jaxspd.errors import UsageError
from jaxspd.request import Request
from jaxspd.runtime.layerwise import HOST
from jaxspd.runtime.residency import Residency
from jaxspd.sampling.guidance import Guided, guide
from jaxspd.sampling.programs import Programs
from jaxspd.sampling.solvers import solver_of
from jaxspd.spectral.plan import Plan
from jaxspd.target import Target


class Denoiser:
    """The transformers that denoise the latents of `family`, in `dtype`. Several threads may use it at once.

    Weights are read when they are first needed, and stay; `residency` reserves memory for them. `loras` are
    those of each transformer. `target` is by default that of `residency`.

    Raises UsageError if the files of weights do not fit the configuration, or if `family` streams its layers
    and the backend cannot.
    """

    def __init__(
        self,
        family,
        dtype,
        residency: Residency,
        loras: Sequence[Loras] = (),
        target: Target | None = None,
    ):
        self._target = target or residency.target
        device = self._target.device
        if family.streamed and HOST not in (m.kind for m in device.addressable_memories()):
            raise UsageError(
                f"JAX's {device.platform} backend streams nothing from host memory; leave dit_cpu_offload out"
            )
        if len(family.transformers) > 1 and family.transformer_weights_path:
            raise UsageError(
                f"{family.title} has two transformers, but transformer_weights_path replaces one; leave it "
                "out or put the files into the pipeline's folders"
            )
        self.family, self._residency = family, residency
        self.parameters = family.abstract_parameters(dtype, self._target)
        pool = ThreadPoolExecutor(1, "load")
        self._transformers = [
            Transformer(family, part, self.parameters, residency, pool, own)
            for part, own in zip(family.transformers, loras or [()] * len(family.transformers), strict=True)
        ]
        self.turns = Turns(self._transformers, residency)
        self._velocity = family.velocity_function(dtype)
        self._programs: dict[tuple[str, str, bool], Programs] = {}
        self._lock = Lock()

    def load(self) -> Future:
        """Starts reading the weights that a run begins with. The future gives them and the seconds that
        reading took.
        """
        return self.turns.load()

    def set_loras(self, loras: Sequence[Loras]) -> None:
        """Merges `loras`, those of each transformer, in place of the earlier ones. Must not be called while
        an output is made. Raises UsageError if one does not fit.
        """
        for one, own in zip(self._transformers, loras, strict=True):
            one.set_loras(own)

    @property
    def places(self) -> dict[str, str]:
        """Transformer -> "host" or "device", for each whose weights are in memory or being read."""
        return {one.part: one.place for one in self._transformers if one.loaded}

    @property
    def place(self) -> str:
        """Where loaded weights, or nearly all of them, are: "host" or "device"."""
        return self._transformers[0].place

    def programs(self, request: Request) -> Programs:
        """The compiled programs for the solver and the grid that `request` asks for."""
        combine = self.family.combine
        key = request.scheduler, request.progressive_grid, request.forecast is not None
        with self._lock:
            if key not in self._programs:
                self._programs[key] = Programs(
                    guide(self._velocity, combine, batched=True),
                    solver_of(request),
                    guide(self._velocity, combine, batched=False),
                    self.family.expansions[request.progressive_grid],
                    self._target,
                )
            return self._programs[key]

    @property
    def spread(self) -> bool:
        """Whether several devices share the work."""
        return self._target.mesh is not None

    def prepare(
        self, family, request: Request, plan: Plan, batch: int = 1
    ) -> tuple[Programs, list[Future], int]:
        """Starts compiling what `plan` needs for `batch` outputs at once. Returns the programs, the futures
        to wait for, and the number of new steps.

        `family` is set to the length of text that `request` asks for.
        """
        programs = self.programs(request)
        before = programs.compiled_steps
        one = conditioning = family.abstract_conditioning(batch)
        if family.guided(request.guidance_scale):
            conditioning = Guided(one, one, jax.ShapeDtypeStruct((batch,), jnp.float32))
        shape = (batch, *family.leading(request.num_frames))
        prepared = programs.prepare(plan, shape, self.parameters, conditioning)
        return programs, prepared, programs.compiled_steps - before
