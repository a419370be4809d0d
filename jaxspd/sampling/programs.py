"""Ahead-of-time compiled programs: a denoising step for each resolution, and the transitions between them."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import jax
import jax.numpy as jnp

from jaxspd.errors import UsageError
from jaxspd.runtime.layerwise import Layerwise
from jaxspd.runtime.memory import LESS_MEMORY, memory_limit
from jaxspd.sampling.forecast import HISTORY
from jaxspd.sampling.noise import stage_noises
from jaxspd.sampling.solver import Solver
from jaxspd.spectral.expansion import EXPANSION, Expansion
from jaxspd.spectral.plan import Plan
from jaxspd.target import Target

# For how many of the last prepared plans the programs are kept.
RECENT = 16
SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


@dataclass
class Programs:
    """Programs of one model and solver for `target`, compiled on first need and kept.

    `velocity(parameters, latents, sigma, conditioning)` predicts `ε - x_0` in the shape of `latents`.
    `lean_velocity` does the same in less memory, and is used where the device cannot hold a step with
    `velocity`. `expansion` grows latents.

    There is one step program, compiled layer by layer, for each shape of latents and of conditioning. σ,
    guidance and everything else about a prompt are arguments, so only a new size compiles anything. Several
    threads may use the programs at once. A program that failed to compile is tried again when it is next
    needed. The programs of the last `RECENT` plans are kept, and any program as long as somebody holds the
    list that `prepare` returned.
    """

    velocity: Callable[..., jax.Array]
    solver: Solver
    lean_velocity: Callable[..., jax.Array] | None = None
    expansion: Expansion = EXPANSION
    target: Target = field(default_factory=Target)
    compiled_steps: int = 0
    compiled_transitions: int = 0
    _programs: WeakValueDictionary[Any, Future] = field(default_factory=WeakValueDictionary)
    _recent: OrderedDict[tuple, list[Future]] = field(default_factory=OrderedDict)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8, "compile"))
    _lock: Any = field(default_factory=Lock)

    def prepare(self, plan: Plan, shape: tuple[int, ...], parameters, conditioning) -> list[Future]:
        """Starts compiling all programs that `plan` needs, in threads, and returns them for `wait`.

        `shape` is the latents' shape before the grid: (batch, channels) or (batch, channels, frames).
        `parameters` and `conditioning` may be abstract.
        """
        previous, prepared = None, []
        for stage in plan.stages:
            latents = jax.ShapeDtypeStruct((*shape, *stage.latent), jnp.float32)
            prepared.append(self._submit_step(parameters, latents, conditioning))
            if stage.skipped:
                prepared.append(self._submit_forecast(latents))
            if previous is not None:
                prepared.append(self._submit_transition(previous, latents, plan))
            previous = latents
        if plan.noise == "shared" and plan.levels:
            prepared.append(self._submit_share(plan, latents))
        with self._lock:
            shapes = tuple(map(id, prepared))
            self._recent[shapes] = prepared
            self._recent.move_to_end(shapes)
            while len(self._recent) > RECENT:
                self._recent.popitem(last=False)
        return prepared

    def wait(self, prepared: Iterable[Future] | None = None) -> float:
        """Waits until `prepared` is compiled, or all programs if it is None, and returns the seconds waited.

        Raises what compilation raised, such as UsageError for a step that does not fit the device's memory.
        """
        begin = time.perf_counter()
        if prepared is None:
            with self._lock:
                prepared = list(self._programs.values())
        for program in prepared:
            program.result()
        return time.perf_counter() - begin

    def step(self, parameters, latents, state, sigma, next_sigma, conditioning):
        """One solver step: `(latents, state)` at `next_sigma`."""
        program = self._programs[_key("step", latents, conditioning)].result()
        return program(parameters, latents, state, sigma, next_sigma, conditioning)

    def forecast(self, latents, state, weights, sigma, next_sigma):
        """Like `step`, without the model; the solver forecasts with `weights` from `sampling.forecast`."""
        return self._programs[_key("forecast", latents)].result()(latents, state, weights, sigma, next_sigma)

    def transition(self, latents, state, noise, sigma, kappa, ratio, plan: Plan):
        """`latents` grown to the finer grid of `noise`, and the solver's state there, as `plan` says."""
        program = self._programs[_transition_key(plan, latents, noise)].result()
        return program(latents, state, noise, sigma, kappa, ratio)

    def noises(self, plan: Plan, seeds: Sequence[int], leading: tuple[int, ...]) -> list:
        """Each stage's noise `[B, *leading, h, w]`, from one seed for each output, for a prepared `plan`."""
        grids = [stage.latent for stage in plan.stages]
        if plan.noise == "fresh" or not plan.levels:
            return stage_noises(seeds, leading, grids)
        [whole] = stage_noises(seeds, leading, grids[-1:])
        return self._programs[_share_key(plan, whole)].result()(whole)

    def _submit_step(self, parameters, latents, conditioning) -> Future:
        return self._submit(
            _key("step", latents, conditioning),
            lambda: self._compile_step(parameters, latents, conditioning),
        )

    def _submit_forecast(self, latents) -> Future:
        return self._submit(_key("forecast", latents), lambda: self._compile_forecast(latents))

    def _submit(self, key: tuple, compile: Callable[[], Any]) -> Future:
        """The program with this `key`; `compile` makes it in a thread unless it is there or under way."""
        with self._lock:
            known = self._programs.get(key)
            # A program that failed is compiled again: the memory that it lacked may be free by now.
            if known and not (known.done() and (known.cancelled() or known.exception())):
                return known
            self.compiled_steps += key[0] == "step"
            self.compiled_transitions += key[0].startswith("transition")
            program = self._programs[key] = self._pool.submit(compile)
            return program

    def _compile_step(self, parameters, latents, conditioning):
        state = jax.eval_shape(self.solver.init, latents)

        def compiled(velocity):
            def denoise_step(parameters, latents, state, sigma, next_sigma, conditioning):
                v = velocity(parameters, latents, sigma, conditioning)
                return self.solver.step(state, latents, v.astype(jnp.float32), sigma, next_sigma)

            arguments = parameters, latents, state, SCALAR, SCALAR, conditioning
            return Layerwise(denoise_step, *arguments, target=self.target)

        limit = self.target.memory or memory_limit(self.target.device)
        program = compiled(self.velocity)
        if self.lean_velocity is not None and program.peak_bytes > limit:
            program = compiled(self.lean_velocity)
        if program.peak_bytes > limit:
            *_, height, width = latents.shape
            raise UsageError(
                f"a step on the latent grid {height}×{width} takes {program.peak_bytes / 1e9:.1f} GB of "
                f"memory, and there are {limit / 1e9:.1f} GB; {LESS_MEMORY}"
            )
        return program

    def _compile_forecast(self, latents):
        def forecast_step(latents, state, weights, sigma, next_sigma):
            assert self.solver.forecast is not None, "a plan that forecasts has a solver that can"
            return self.solver.forecast(state, latents, weights, sigma, next_sigma)

        state = jax.eval_shape(self.solver.init, latents)
        weights = jax.ShapeDtypeStruct((HISTORY,), jnp.float32)
        return self.target.compile(forecast_step, latents, state, weights, SCALAR, SCALAR)

    def _submit_transition(self, coarse, fine, plan: Plan) -> Future:
        return self._submit(
            _transition_key(plan, coarse, fine), lambda: self._compile_transition(coarse, fine, plan)
        )

    def _compile_transition(self, coarse, fine, plan: Plan):
        def transition(latents, state, noise, sigma, kappa, ratio):
            def expand(latents, sigma, kappa):
                return self.expansion.expand(latents, noise, sigma, kappa, plan.transform)

            latents = expand(latents, sigma, kappa)
            if plan.history == "forget":
                return latents, self.solver.init(latents)
            return latents, self.solver.grow(state, latents, expand, ratio)

        state = jax.eval_shape(self.solver.init, coarse)
        return self.target.compile(transition, coarse, state, fine, SCALAR, SCALAR, SCALAR)

    def _submit_share(self, plan: Plan, noise) -> Future:
        grids = [stage.latent for stage in plan.stages]
        share = partial(self.expansion.share, grids=grids, transform=plan.transform)
        return self._submit(_share_key(plan, noise), lambda: self.target.compile(share, noise))


def peak_bytes(prepared: Iterable[Future]) -> int:
    """The largest number of bytes that a denoising step in `prepared` takes, arguments included.

    `prepared` is what `Programs.prepare` returned.
    """
    return max(
        program.peak_bytes for program in (p.result() for p in prepared) if isinstance(program, Layerwise)
    )


def _transition_key(plan: Plan, coarse, fine) -> tuple:
    return _key(f"transition in {plan.transform}, {plan.history}", coarse, fine)


def _share_key(plan: Plan, noise) -> tuple:
    return *_key(f"noise in {plan.transform}", noise), *(stage.latent for stage in plan.stages)


def _key(kind: str, *trees: Any) -> tuple:
    return kind, *((a.shape, str(a.dtype)) for a in jax.tree.leaves(trees))
