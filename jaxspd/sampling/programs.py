"""Ahead-of-time compiled programs: a denoising step for each resolution, and what joins them."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxspd.sampling.layerwise import Layerwise
from jaxspd.sampling.solver import Solver
from jaxspd.spectral.expansion import EXPANSION, Expansion
from jaxspd.spectral.plan import Plan

SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


@dataclass
class Programs:
    """Programs of one model and solver, compiled on first need and kept.

    `velocity(parameters, latents, sigma, conditioning)` predicts `ε - x_0` in the shape of `latents`;
    `lean_velocity` does the same in less memory and takes its place where the device could not hold
    the first. `expansion` grows latents. There is one step program, compiled
    layer by layer, for each latent shape and shape of conditioning: σ, guidance and everything else about a
    prompt are arguments, so that nothing but a new size compiles anything.
    """

    velocity: Callable[..., jax.Array]
    solver: Solver
    lean_velocity: Callable[..., jax.Array] | None = None
    expansion: Expansion = EXPANSION
    compiled_steps: int = 0
    compiled_transitions: int = 0
    _programs: dict[Any, Future] = field(default_factory=dict)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8, "compile"))

    def prepare(self, plan: Plan, shape: tuple[int, ...], parameters, conditioning) -> None:
        """Starts compiling whatever `plan` needs, all of it at once in threads.

        `shape` is the latents' before the grid: (batch, channels) or (batch, channels, frames).
        `parameters` and `conditioning` may be abstract.
        """
        previous = None
        for stage in plan.stages:
            latents = jax.ShapeDtypeStruct((*shape, *stage.latent), jnp.float32)
            self._submit_step(parameters, latents, conditioning)
            if previous is not None:
                self._submit_transition(previous, latents, plan.transform)
            previous = latents
        if plan.noise == "shared" and plan.levels:
            self._submit_share(plan, latents)

    def wait(self) -> float:
        """Seconds waited until all that was asked for is compiled."""
        begin = time.perf_counter()
        for program in self._programs.values():
            program.result()
        return time.perf_counter() - begin

    def step(self, parameters, latents, state, sigma, next_sigma, conditioning):
        """One solver step: `(latents, state)` at `next_sigma`."""
        program = self._programs[_key("step", latents, conditioning)].result()
        return program(parameters, latents, state, sigma, next_sigma, conditioning)

    def transition(self, latents, noise, sigma, kappa, transform: str) -> jax.Array:
        """`latents` on the finer grid of `noise`."""
        program = self._programs[_key(f"transition in {transform}", latents, noise)].result()
        return program(latents, noise, sigma, kappa)

    def share(self, plan: Plan, noise) -> list[jax.Array]:
        """What each stage of `plan` sees of one `noise` `[B, *leading, H, W]` on the last grid."""
        if not plan.levels:
            return [noise]
        return self._programs[_share_key(plan, noise)].result()(noise)

    def _submit_step(self, parameters, latents, conditioning) -> None:
        key = _key("step", latents, conditioning)
        if key not in self._programs:
            self.compiled_steps += 1
            self._programs[key] = self._pool.submit(self._compile_step, parameters, latents, conditioning)

    def _compile_step(self, parameters, latents, conditioning):
        state = jax.eval_shape(self.solver.init, latents)

        def compiled(velocity):
            def denoise_step(parameters, latents, state, sigma, next_sigma, conditioning):
                v = velocity(parameters, latents, sigma, conditioning)
                return self.solver.step(state, latents, v.astype(jnp.float32), sigma, next_sigma)

            return Layerwise(denoise_step, parameters, latents, state, SCALAR, SCALAR, conditioning)

        program = compiled(self.velocity)
        if self.lean_velocity is not None and not fits(program):
            program = compiled(self.lean_velocity)
        return program

    def _submit_transition(self, coarse, fine, transform: str) -> None:
        key = _key(f"transition in {transform}", coarse, fine)
        if key not in self._programs:
            self.compiled_transitions += 1
            self._programs[key] = self._pool.submit(
                lambda: (
                    jax.jit(partial(self.expansion.expand, transform=transform))
                    .lower(coarse, fine, SCALAR, SCALAR)
                    .compile()
                )
            )

    def _submit_share(self, plan: Plan, noise) -> None:
        key = _share_key(plan, noise)
        if key not in self._programs:
            share = partial(
                self.expansion.share, grids=[stage.latent for stage in plan.stages], transform=plan.transform
            )
            self._programs[key] = self._pool.submit(lambda: jax.jit(share).lower(noise).compile())


def fits(program: Layerwise) -> bool:
    """Whether the device holds the program with everything it works on, as far as it can tell."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return not limit or program.peak_bytes <= limit


def _share_key(plan: Plan, noise) -> tuple:
    return _key(f"noise in {plan.transform}", noise), tuple(stage.latent for stage in plan.stages)


def _key(kind: str, *trees: Any) -> tuple:
    return kind, *((a.shape, str(a.dtype)) for a in jax.tree.leaves(trees))
