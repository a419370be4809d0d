"""Pictures of the embedded demo for the quality study: the same prompts and noise in every cell."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from cells import Cell
from tqdm import tqdm
from training.landscapes import Scene, describe
from training.landscapes import sample as landscape

from jaxspd.components.pipeline import Components
from jaxspd.convert.orbax_store import load_transformer
from jaxspd.families import open_family
from jaxspd.hub import DEMO
from jaxspd.planning import plan_request
from jaxspd.request import SamplingParams
from jaxspd.sampling.loop import denoise
from jaxspd.sampling.programs import Programs
from jaxspd.sampling.solvers import SOLVERS, default_solver
from jaxspd.spectral.plan import Plan

# The captions come from seeds that neither the training pictures nor other checks have used.
FIRST_SEED = 5_000_000
BATCH = 5


def captions(count: int) -> tuple[list[Scene], list[str]]:
    """The study's first `count` scenes and their captions."""
    scenes, texts = zip(*(describe(FIRST_SEED + i)[:2] for i in range(count)), strict=True)
    return list(scenes), list(texts)


class Demo:
    """The demo checkpoint, ready to denoise batches of the study's `count` captions."""

    def __init__(self, count: int):
        self.family = open_family(DEMO)
        self.components = Components(self.family, jnp.float32)
        self.count, self.leading = count, self.family.leading(1)
        self.conditioning = self.family.condition(self.components.encode_text(captions(count)[1]), 0.0)
        self.parameters = load_transformer(
            self.family.folder,
            self.family.abstract_parameters(jnp.float32),
            self.family.rules,
        )
        self.velocity = self.family.velocity_function(jnp.float32)
        self.programs = {}  # by expansion and solver

    def plan(self, cell: Cell, cells: dict[str, Cell]) -> Plan:
        """The plan of `cell`. If that has `as_fast_as`, its steps are so few that the FLOPs match."""
        steps = cell.steps
        if cell.as_fast_as:
            plan = self.plan(cells[cell.as_fast_as], cells)
            steps = round(plan.steps / plan.flop_speedup(self.family.forward_flops))
        return plan_request(self.family, SamplingParams(num_inference_steps=steps, **cell.settings))

    def pictures(self, cell: Cell, plan: Plan) -> np.ndarray:
        """A picture for each caption, `[N, H, W, 3]`, uint8."""
        expansion = cell.expansion or self.family.expansions["latent"]
        name = cell.settings.get("scheduler") or default_solver(self.family.scheduler)
        programs = self.programs.setdefault(
            (expansion, name), Programs(self.velocity, SOLVERS[name], expansion=expansion)
        )
        starts = tqdm(range(0, self.count, BATCH), desc=cell.name)
        batches = (range(start, min(start + BATCH, self.count)) for start in starts)
        latents = [self.latents(programs, plan, batch) for batch in batches]
        return self.components.decode(np.concatenate(latents))[:, 0]

    def latents(self, programs: Programs, plan: Plan, captions: range) -> np.ndarray:
        """The clean latents `[B, C, h, w]` of a range of the study's captions, in one batch."""
        rows = slice(captions.start, captions.stop)
        conditioning = jax.tree.map(lambda array: array[rows], self.conditioning)
        programs.prepare(plan, (len(captions), *self.leading), self.parameters, conditioning)
        noises = programs.noises(plan, [FIRST_SEED + number for number in captions], self.leading)
        return np.asarray(denoise(programs, plan, self.parameters, conditioning, noises)[0])


def drawn(count: int, first_seed: int, folder: Path) -> np.ndarray:
    """Pictures like those of the training, `[count, H, W, 3]`, encoded and decoded by the demo's VAE.

    No latents decode to sharper pictures.
    """
    path = folder / f"drawn-{first_seed}-{count}.npy"
    if not path.exists():
        components, pictures = Components(open_family(DEMO), jnp.float32), []
        for seed in tqdm(range(first_seed, first_seed + count), desc="drawn"):
            pictures.append(components.encode(landscape(seed)[0][None, None]))
        np.save(path, components.decode(np.concatenate(pictures))[:, 0])
    return np.load(path)


def sample(demo: Demo, cells: list[Cell], folder: Path) -> dict[str, tuple[Plan, np.ndarray]]:
    """The plan and the pictures of each cell. Pictures in `folder` that the same plan made are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    made, by_name = {}, {cell.name: cell for cell in cells}
    for cell in cells:
        plan = demo.plan(cell, by_name)
        stem = "".join(c if c.isalnum() or c in "._" else "-" for c in cell.name)
        pictures, note = folder / f"{stem}.npy", folder / f"{stem}.json"
        said = json.dumps({"plan": repr(plan), "count": demo.count, "expansion": cell.expansion is not None})
        if not note.exists() or note.read_text() != said:
            np.save(pictures, demo.pictures(cell, plan))
            note.write_text(said)
        made[cell.name] = plan, np.load(pictures, mmap_mode="r")
    return made
