"""The whole denoising of a video beside the PyTorch reference: both solvers, guidance, growth."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from jaxspd.convert.checkpoint import Checkpoint
from jaxspd.convert.loader import load_parameters
from jaxspd.families import open_family
from jaxspd.sampling.guidance import Guided, guide
from jaxspd.sampling.loop import denoise
from jaxspd.sampling.noise import stage_noises
from jaxspd.sampling.programs import Programs
from jaxspd.sampling.solvers import SOLVERS
from jaxspd.spectral.levels import halvings
from jaxspd.spectral.spectrum import Spectrum
from tests import tiny
from tests.compare import relative
from tests.plans import plan_of
from torch_ref.wan import WanReference

LATENT, LEADING = (16, 24), (4, 3)
SPECTRUM = (20.0, 3.0)
PROMPTS, NEGATIVE = ["a red house", "Blue hills, night"], ["blur", "blur"]
STEPS, DELTA, SEEDS = 14, 0.05, [5, 6]


class Model:
    """One tiny Wan on both sides."""

    def __init__(self, folder):
        self.family = open_family(folder)
        abstract = self.family.abstract_parameters(jnp.float32)
        self.parameters = load_parameters(Checkpoint(folder / "transformer"), abstract, self.family.rules)
        self.reference = WanReference.from_pretrained(folder)
        velocity = self.family.velocity_function(jnp.float32)
        # Shared, so that each resolution compiles once for all comparisons.
        self.programs = {
            (name, batched): Programs(guide(velocity, batched=batched), solver)
            for name, solver in SOLVERS.items()
            for batched in (True, False)
        }

    def plan(self, mode, levels, flow_shift=None):
        return plan_of(
            halvings(LATENT, levels),
            self.family.sigmas(STEPS, tokens=0, flow_shift=flow_shift),
            Spectrum(*SPECTRUM),
            mode=mode,
            delta=DELTA,
            tokens=lambda grid: self.family.tokens((*LEADING, *grid)),
        )

    def both(self, plan, *, scheduler="unipc", guidance=5.0, flow_shift=None, batched=True):
        """Our latents and the reference's, from the same noise and the reference's embeddings."""
        noises = stage_noises(SEEDS, LEADING, [stage.latent for stage in plan.stages])
        guided = self.family.guided(guidance)
        text, negative = self.reference.encode(PROMPTS, NEGATIVE if guided else None)
        theirs = self.reference.denoise(
            noises,
            text,
            negative,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            scheduler=scheduler,
            flow_shift=flow_shift,
            mode=plan.mode,
            levels=plan.levels,
            delta=DELTA,
            spectrum=SPECTRUM,
        )
        conditioning = {"text": text.numpy()}
        if guided:
            scale = np.full(len(SEEDS), guidance, np.float32)
            conditioning = Guided(conditioning, {"text": negative.numpy()}, scale)
        programs = self.programs[scheduler, batched]
        programs.prepare(plan, (len(SEEDS), *LEADING), self.parameters, conditioning)
        ours, _ = denoise(programs, plan, self.parameters, conditioning, noises)
        chex.assert_shape(ours, (len(SEEDS), *LEADING, *LATENT))
        return np.asarray(ours), theirs.numpy()


@pytest.fixture(scope="module")
def model(wan_folder):
    return Model(wan_folder)


def assert_equal(ours, theirs):
    for video, expected in zip(ours, theirs, strict=True):
        assert relative(video, expected) <= 1e-4


@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
@pytest.mark.parametrize(
    ("mode", "levels", "split"),
    [
        ("fullres", 0, [14]),
        ("dct", 1, [8, 6]),
        ("dct_rewind", 1, [8, 6]),
        ("dct_rewind", 2, [3, 5, 6]),
    ],
)
def test_latents_are_the_references(model, scheduler, mode, levels, split):
    plan = model.plan(mode, levels)
    # Every stage has steps in number, so that UniPC has a history to forget.
    assert [stage.steps for stage in plan.stages] == split
    assert_equal(*model.both(plan, scheduler=scheduler))


@pytest.mark.parametrize(
    "options",
    [{"guidance": 1.0}, {"flow_shift": 5.0}, {"batched": False}],
    ids=["no guidance", "flow shift", "two forwards"],
)
def test_options_do_what_the_reference_does(model, options):
    plan = model.plan("dct_rewind", 1, options.get("flow_shift"))
    assert_equal(*model.both(plan, **options))


def test_a_checkpoint_with_eulers_schedule(tmp_path):
    """Its noise levels differ from UniPC's, and its time steps are not whole; UniPC runs on them too."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    model = Model(tiny.write_wan(tmp_path, scheduler=scheduler, seed=3))
    plan = model.plan("dct_rewind", 1)
    for name in SOLVERS:
        assert_equal(*model.both(plan, scheduler=name))


def test_solvers_and_modes_give_latents_of_their_own(model):
    """Else one could pass for another."""
    results = [
        model.both(model.plan(mode, 1), scheduler=scheduler)[0]
        for mode in ("dct", "dct_rewind")
        for scheduler in ("unipc", "euler")
    ]
    for number, one in enumerate(results):
        for other in results[:number]:
            assert relative(one, other) > 0.01


def test_the_model_is_told_whole_thousandths(model):
    """As UniPC's official scheduler counts time: σ within one thousandth is the same to the model."""
    velocity = jax.jit(model.family.velocity_function(jnp.float32))
    latents = stage_noises([1], LEADING, [LATENT])[0]
    text = {"text": model.reference.encode(PROMPTS[:1])[0].numpy()}
    at = {
        sigma: np.asarray(velocity(model.parameters, latents, np.float32(sigma), text))
        for sigma in (0.5001, 0.5009, 0.5011)
    }
    np.testing.assert_array_equal(at[0.5001], at[0.5009])
    assert relative(at[0.5011], at[0.5009]) > 1e-5
