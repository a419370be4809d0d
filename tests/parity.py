"""Both sides of a comparison: our transformer or family, and its reference."""

from dataclasses import asdict, replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspd.convert.checkpoint import Checkpoint
from jaxspd.convert.loader import load_parameters
from jaxspd.families import open_family
from jaxspd.families.configs import read_transformer_config
from jaxspd.planning import plan_request
from jaxspd.request import SamplingParams
from jaxspd.sampling.forecast import forecasting
from jaxspd.sampling.guidance import Guided, guide
from jaxspd.sampling.loop import denoise
from jaxspd.sampling.noise import stage_noises
from jaxspd.sampling.programs import Programs
from jaxspd.sampling.solvers import SOLVERS, default_solver
from jaxspd.spectral.spectrum import Spectrum
from tests.compare import relative
from tests.components import components

# Steep enough that the grids of 4×6, 8×12 and 16×24 latents each get several of a dozen steps.
STEEP = (20.0, 3.0)


def flax_transformer(model_class, config_class, rules, pipeline, dtype=jnp.float32, static=()):
    """`(config, call)` of the pipeline's `transformer` folder; `call` is our compiled transformer. `static`
    are the indices of the arguments that are not arrays.
    """
    config = read_transformer_config(pipeline, config_class)
    abstract = model_class(config, dtype=dtype)
    graph, state = nnx.split(abstract)
    parameters = load_parameters(Checkpoint(pipeline / "transformer"), state, rules)
    call = jax.jit(
        lambda p, *inputs: nnx.merge(graph, p)(*inputs), static_argnums=[1 + number for number in static]
    )
    return config, lambda *inputs: call(parameters, *inputs)


class Loop:
    """The denoising of one tiny checkpoint, here and in torch_ref's `reference`.

    `latent` is the size of latents; videos have `frames` frames. `texts(prompts)` makes the reference's
    arguments. `text_tokens` pads texts to less than the family's length.
    """

    def __init__(self, folder, reference, latent=(16, 24), frames=1, texts=None, text_tokens=None):
        self.texts = texts or (lambda prompts: (reference.encode(prompts),))
        self.family, self.reference, self.latent, self.frames = open_family(folder), reference, latent, frames
        self.family = replace(self.family, text_tokens=text_tokens or self.family.text_tokens)
        self.components, self.leading = components(self.family), self.family.leading(frames)
        abstract = self.family.abstract_parameters(jnp.float32)
        self.parameters = load_parameters(Checkpoint(folder / "transformer"), abstract, self.family.rules)
        velocity, combine = self.family.velocity_function(jnp.float32), self.family.combine
        # Shared, so that each resolution is compiled only once for all comparisons.
        self.programs = {
            (grid, name): Programs(
                guide(velocity, combine, batched=True), forecasting(solver), expansion=expansion
            )
            for grid, expansion in self.family.expansions.items()
            for name, solver in SOLVERS.items()
        }

    def plan(self, mode, levels, steps, delta):
        settings = {"levels": levels} if mode != "fullres" else {}
        return self.request(steps, mode=mode, delta=delta, **settings)

    def request(self, steps, forecast=None, **settings):
        """The plan of a request with `settings`: options whose names start with `progressive_`, here without
        that prefix.
        """
        height, width = (side * self.family.pixels_per_latent for side in self.latent)
        params = SamplingParams(
            num_inference_steps=steps,
            height=height,
            width=width,
            num_frames=self.frames,
            forecast=forecast,
            spectrum=None if "sigmas" in settings else asdict(Spectrum(*STEEP)),
            **{f"progressive_{name}": value for name, value in settings.items()},
        )
        return plan_request(self.family, params)

    def both(self, plan, prompts, negatives, guidance, seeds=(5, 6), grid=None, scheduler=None, **growth):
        """Our latents of `plan` and the reference's, from the same noise and text.

        `grid` names the grid that grows, if the family has several. `scheduler` replaces the checkpoint's
        solver. `growth` are the reference's arguments that the plan does not hold.
        """
        scheduler = scheduler or default_solver(self.family.scheduler)
        grids = [stage.latent for stage in plan.stages]
        noises = stage_noises(seeds, self.leading, grids[-1:] if plan.noise == "shared" else grids)
        arguments = self.texts(prompts)
        conditioning = self.family.condition(self.components.encode_text(prompts), guidance)
        if self.family.guided(guidance):
            arguments = (*arguments, *self.texts(negatives))
            negative = self.family.condition(self.components.encode_text(negatives), guidance)
            conditioning = Guided(conditioning, negative, np.full(len(seeds), guidance, np.float32))
        planned = {name: getattr(plan, name) for name in ("mode", "levels", "delta", "noise", "history")}
        theirs = self.reference.denoise(
            noises,
            *arguments,
            num_inference_steps=plan.steps,
            guidance_scale=guidance,
            **{**planned, "scheduler": scheduler, "spectrum": STEEP, **growth},
            **({} if grid is None else {"grid": grid}),
        )
        programs = self.programs[grid or next(iter(self.family.expansions)), scheduler]
        programs.prepare(plan, (len(seeds), *self.leading), self.parameters, conditioning)
        own = programs.noises(plan, seeds, self.leading)
        ours, _ = denoise(programs, plan, self.parameters, conditioning, own)
        chex.assert_shape(ours, (len(seeds), *self.leading, *self.latent))
        return np.asarray(ours), np.asarray(theirs)


def assert_matters(call, inputs, position, change=lambda x: 0.5 * x):
    """Asserts that a `change` to one input of the second batch element changes its result, and not the
    first's.
    """
    before = np.asarray(call(*inputs))
    changed = inputs[position].copy()
    changed[1] = change(changed[1])
    after = np.asarray(call(*inputs[:position], changed, *inputs[position + 1 :]))
    assert relative(after[1], before[1]) > 1e-3
    chex.assert_trees_all_close(after[0], before[0], rtol=0, atol=1e-6)


def assert_each_within(tolerance, ours, theirs):
    """Asserts the tolerance for every batch element separately, so that none hides behind another."""
    assert len(ours) == len(theirs)
    for one, expected in zip(ours, theirs, strict=True):
        assert relative(one, expected) <= tolerance
