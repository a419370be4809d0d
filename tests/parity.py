"""Both sides of a comparison: our transformer or family, and what judges it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.checkpoint import Checkpoint
from convert.loader import load_parameters
from jaxspd.families import open_family
from jaxspd.families.base import read_transformer_config
from jaxspd.sampling.guidance import Guided, guide
from jaxspd.sampling.loop import denoise
from jaxspd.sampling.noise import stage_noises
from jaxspd.sampling.programs import Programs
from jaxspd.sampling.solvers import SOLVERS
from jaxspd.spectral.levels import halvings
from jaxspd.spectral.plan import make_plan
from jaxspd.spectral.spectrum import Spectrum
from tests.compare import relative

# Steep enough that 4×6, 8×12 and 16×24 latents all get several of a dozen steps.
STEEP = (20.0, 3.0)


def flax_transformer(model_class, config_class, rules, pipeline, dtype=jnp.float32, static=()):
    """`(config, call)`: our transformer of the pipeline's `transformer` folder as a compiled function;
    `static` numbers the arguments that are no arrays.
    """
    config = read_transformer_config(pipeline, config_class)
    abstract = nnx.eval_shape(lambda: model_class(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    parameters = load_parameters(Checkpoint(pipeline / "transformer"), state, rules)
    call = jax.jit(
        lambda p, *inputs: nnx.merge(graph, p)(*inputs), static_argnums=[1 + number for number in static]
    )
    return config, lambda *inputs: call(parameters, *inputs)


class Loop:
    """The denoising of one tiny checkpoint of pictures, here and in its `reference` of torch_ref.

    `encode(prompts)` gives the reference's text and the same as our conditioning before `condition`.
    """

    def __init__(self, folder, reference, encode, latent=(16, 24)):
        self.family, self.reference, self.encode, self.latent = open_family(folder), reference, encode, latent
        abstract = self.family.abstract_parameters(jnp.float32)
        self.parameters = load_parameters(Checkpoint(folder / "transformer"), abstract, self.family.rules)
        velocity, combine = self.family.velocity_function(jnp.float32), self.family.combine
        # Shared, so that each resolution compiles once for all comparisons.
        self.programs = {
            grid: Programs(guide(velocity, combine, batched=True), SOLVERS["euler"], expand=expand)
            for grid, expand in self.family.expansions.items()
        }

    def plan(self, mode, levels, steps, delta):
        leading = self.family.leading(1)

        def tokens(grid):
            return self.family.tokens((*leading, *grid))

        return make_plan(
            halvings(self.latent, levels),
            self.family.sigmas(steps, tokens(self.latent)),
            Spectrum(*STEEP),
            mode=mode,
            delta=delta,
            tokens=tokens,
        )

    def both(self, plan, prompts, negatives, guidance, seeds=(5, 6), grid=None):
        """Latents of `plan`, ours and the reference's, from the same noise and text. `grid` is the one that
        grows, where the family has several.
        """
        leading = self.family.leading(1)
        noises = stage_noises(seeds, leading, [stage.latent for stage in plan.stages])
        text, conditioning = self.encode(prompts)
        conditioning = self.family.condition(conditioning, guidance)
        arguments = [text]
        if self.family.guided(guidance):
            negative_text, negative = self.encode(negatives)
            arguments.append(negative_text)
            scale = np.full(len(seeds), guidance, np.float32)
            conditioning = Guided(conditioning, self.family.condition(negative, guidance), scale)
        theirs = self.reference.denoise(
            noises,
            *arguments,
            num_inference_steps=plan.steps,
            guidance_scale=guidance,
            mode=plan.mode,
            levels=plan.levels,
            delta=plan.delta,
            spectrum=STEEP,
            **({} if grid is None else {"grid": grid}),
        )
        programs = self.programs[grid or next(iter(self.programs))]
        programs.prepare(plan, (len(seeds), *leading), self.parameters, conditioning)
        ours, _ = denoise(programs, plan, self.parameters, conditioning, noises)
        chex.assert_shape(ours, (len(seeds), *leading, *self.latent))
        return np.asarray(ours), np.asarray(theirs)


def assert_matters(call, inputs, position, change=lambda x: 0.5 * x):
    """`change` to one input of the second batch element moves what it gives, and nothing of the first's."""
    before = np.asarray(call(*inputs))
    changed = inputs[position].copy()
    changed[1] = change(changed[1])
    after = np.asarray(call(*inputs[:position], changed, *inputs[position + 1 :]))
    assert relative(after[1], before[1]) > 1e-3
    chex.assert_trees_all_close(after[0], before[0], rtol=0, atol=1e-6)


def assert_each_within(tolerance, ours, theirs):
    """Every batch element by itself, so that none hides behind another."""
    assert len(ours) == len(theirs)
    for one, expected in zip(ours, theirs, strict=True):
        assert relative(one, expected) <= tolerance
