"""The process of the parity suite that runs jaxspd.

python bench/parity_jax.py JOB.json ANSWER.json
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax_worker import condition, programs_of
from worker import Inputs

from jaxspd.convert.orbax_store import load_transformer
from jaxspd.families import open_family
from jaxspd.models.attention import attention
from jaxspd.planning import plan_request
from jaxspd.request import SamplingParams
from jaxspd.resolving import resolve
from jaxspd.runtime.backend import start_backend
from jaxspd.runtime.layerwise import Layerwise
from jaxspd.sampling.loop import denoise
from jaxspd.sampling.programs import SCALAR


def model_outputs(job: dict) -> dict[str, jax.Array]:
    """The `velocity/<stage>` of each stage's noise at the job's σ, and the latents of the whole `loop`."""
    dtype, inputs = jnp.dtype(job["dtype"]), Inputs(job["inputs"])
    family = open_family(Path(job["checkpoint"]))
    parameters = load_transformer(family.folder, family.abstract_parameters(dtype), family.rules)
    params = resolve(family, SamplingParams(**job["request"]))
    plan = plan_request(family, params)
    conditioning = condition(family, inputs, params.guidance_scale)
    programs = programs_of(family, family.velocity_function(dtype), params.scheduler)
    outputs, sigma = {}, np.float32(job["sigma"])
    for stage, noise in enumerate(inputs.noises()):
        program = Layerwise(programs.velocity, parameters, noise, SCALAR, conditioning)
        outputs[f"velocity/{stage}"] = program(parameters, noise, sigma, conditioning)
    programs.prepare(plan, (1, *family.leading(params.num_frames)), parameters, conditioning)
    programs.wait()
    outputs["loop"], _ = denoise(programs, plan, parameters, conditioning, inputs.noises())
    return outputs


def attention_outputs(job: dict) -> tuple[dict[str, jax.Array], bool]:
    """The attention of each kind, and as `<kind>, padded` that with padded keys.

    Also returns whether all of it runs in cuDNN.
    """
    outputs, fused = {}, True
    with np.load(job["inputs"]) as arrays:
        for kind in job["kinds"]:
            maps = [jnp.asarray(arrays[f"{kind}/{name}"], job["dtype"]) for name in ("query", "key", "value")]
            for name, given in ((kind, maps), (f"{kind}, padded", [*maps, arrays[f"{kind}/lengths"]])):
                program = jax.jit(attention).lower(*given).compile()
                outputs[name] = program(*given)
                fused &= "cudnn$fmha" in program.as_text()
    return outputs, fused


def main(job_file: str, answer_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    start_backend()
    # Products in float32 must be exact, where a GPU's default is TF32. Programs compile in threads, which see
    # only global settings.
    full = job["dtype"] == "float32"
    jax.config.update("jax_default_matmul_precision", "highest" if full else None)
    answer = {"device": jax.devices()[0].device_kind}
    if "checkpoint" in job:
        outputs = model_outputs(job)
    else:
        outputs, answer["cudnn"] = attention_outputs(job)
    np.savez(job["outputs"], **{name: np.asarray(output, np.float32) for name, output in outputs.items()})
    Path(answer_file).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
