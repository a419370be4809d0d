"""The process of a comparison that runs jaxspd.

python bench/jax_worker.py JOB.json ANSWER.json
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from timing import median_seconds
from worker import Inputs, Job

from jaxspd.components.pipeline import Components
from jaxspd.convert.orbax_store import load_transformer
from jaxspd.families import open_family
from jaxspd.planning import plan_request
from jaxspd.request import SamplingParams
from jaxspd.resolving import resolve
from jaxspd.results import peak_memory
from jaxspd.runtime.backend import start_backend
from jaxspd.sampling.guidance import Guided, guide
from jaxspd.sampling.loop import denoise
from jaxspd.sampling.programs import Programs
from jaxspd.sampling.solvers import SOLVERS

COMPILED = "/jax/core/compile/backend_compile_duration"


def matmul_flops(side: int, dtype) -> float:
    """The FLOP/s of a product of two square matrices."""
    one = jax.random.normal(jax.random.key(0), (side, side), dtype)
    multiply = jax.jit(jnp.matmul)
    return 2 * side**3 / median_seconds(lambda: multiply(one, one).block_until_ready())


def condition(family, inputs: Inputs, scale: float):
    """The denoiser's conditioning for one prompt, and for its negative prompt if there is guidance."""
    conditioning = family.condition(inputs.text("positive"), scale)
    if not family.guided(scale):
        return conditioning
    negative = family.condition(inputs.text("negative"), scale)
    return Guided(conditioning, negative, np.full(1, scale, np.float32))


def programs_of(family, velocity, solver: str) -> Programs:
    """Programs of `velocity`, made as the generator makes them."""
    return Programs(
        guide(velocity, family.combine, batched=True),
        SOLVERS[solver],
        guide(velocity, family.combine, batched=False),
        next(iter(family.expansions.values())),
    )


def main(job_file: str, answer_file: str) -> None:
    job = Job(job_file, answer_file)
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compilations.append(seconds) if event == COMPILED else None
    )
    dtype = jnp.dtype(job.dtype)
    start_backend()
    job.answer["device"] = jax.devices()[0].device_kind
    job.answer["versions"] = {"jax": jax.__version__}
    job.answer["matmul_flops"] = [matmul_flops(job.matmul, dtype)]

    family = open_family(job.folder)
    abstract = family.abstract_parameters(dtype)
    begin = time.perf_counter()
    parameters = load_transformer(family.folder, abstract, family.rules)
    jax.block_until_ready(parameters)
    job.answer["load"] = time.perf_counter() - begin

    velocity, programs = family.velocity_function(dtype), {}

    def run(name: str, kind: str) -> tuple[jax.Array, list[float], float]:
        """The latents, the seconds of each stage, and the seconds waited for programs to compile."""
        params = resolve(family, SamplingParams(**job.cells[name][kind]["request"]))
        plan, inputs = plan_request(family, params), Inputs(job.cells[name]["inputs"])
        if params.scheduler not in programs:
            programs[params.scheduler] = programs_of(family, velocity, params.scheduler)
        own = programs[params.scheduler]
        conditioning = condition(family, inputs, params.guidance_scale)
        begin = time.perf_counter()
        own.prepare(plan, (1, *family.leading(params.num_frames)), abstract, conditioning)
        own.wait()
        compiling = time.perf_counter() - begin
        latents, seconds = denoise(own, plan, parameters, conditioning, inputs.noises())
        return latents, seconds, compiling

    for name, measured in job.measured.items():
        _, _, measured["compile"] = run(name, "warm")
    compilations.clear()
    for name, measured in job.rounds():
        latents, seconds, _ = run(name, "run")
        measured["denoise"].append(seconds)
        job.keep(name, np.asarray(latents))
    job.answer["compiled_later"] = len(compilations)
    job.answer["peak"] = peak_memory(jax.devices()[0])

    # This is measured as for a prompt that follows others, when encoders and VAE are in memory.
    components = Components(family, dtype, offload=False)
    if job.encoders:
        job.answer["text"] = median_seconds(lambda: components.encode_text([job.prompt]), 3)
    job.answer["decode"] = median_seconds(lambda: components.decode(np.asarray(latents)), 1)
    job.answer["matmul_flops"].append(matmul_flops(job.matmul, dtype))
    job.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
