"""The process of a comparison that runs torch_ref, eager or compiled.

python bench/torch_worker.py JOB.json ANSWER.json
"""

import resource
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from timing import median_seconds
from torch._dynamo.utils import get_compilation_metrics
from worker import Inputs, Job

from jaxspd.runtime.malloc import keep_freed_memory
from torch_ref.flux1 import Flux1Reference
from torch_ref.flux2 import Flux2Reference
from torch_ref.qwen_image import QwenImageReference
from torch_ref.wan import WanReference
from torch_ref.z_image import ZImageReference

REFERENCES = {
    "FluxPipeline": Flux1Reference,
    "Flux2KleinPipeline": Flux2Reference,
    "WanPipeline": WanReference,
    "ZImagePipeline": ZImageReference,
    "QwenImagePipeline": QwenImageReference,
}
CUDA = torch.cuda.is_available()


def finish() -> float:
    """Waits until the device has done all its work, and returns the time."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def matmul_flops(side: int, dtype: torch.dtype) -> float:
    """The FLOP/s of a product of two square matrices."""
    one = torch.randn(side, side, dtype=dtype, device="cuda" if CUDA else "cpu")
    return 2 * side**3 / median_seconds(lambda: (one @ one, finish()))


def texts(reference, text: dict[str, np.ndarray]) -> tuple:
    """One prompt's encoded text as `reference.denoise` takes it, without padding if the model masks it."""
    if not text:
        return ()
    states = torch.from_numpy(text["text"])
    if "lengths" in text:
        states = states[:, : int(text["lengths"][0])]
    if isinstance(reference, ZImageReference):
        return (list(states),)
    if isinstance(reference, QwenImageReference):
        return ((states, None),)
    if isinstance(reference, Flux1Reference):
        return states, torch.from_numpy(text["pooled"])
    return (states,)


class Clock:
    """A transformer's forward that records when each of its calls is done."""

    def __init__(self, forward):
        self.forward, self.times = forward, []

    def __call__(self, *args, **kwargs):
        result = self.forward(*args, **kwargs)
        self.times.append(finish())
        return result

    def stages(self, begin: float, end: float, steps: list[int]) -> list[float]:
        """The seconds of each stage. `steps` are their numbers of steps, and all steps have as many calls."""
        calls = len(self.times) // sum(steps)
        ends = [self.times[calls * done - 1] for done in np.cumsum(steps)]
        ends[-1] = end
        return np.diff([begin, *ends]).tolist()


def open_reference(folder: Path, dtype: str):
    """The family's reference, without the parts that the folder lacks."""
    index = diffusers.DiffusionPipeline.load_config(folder)
    absent = {name: None for name, part in index.items() if part == [None, None]}
    kind = REFERENCES[index["_class_name"]]
    dtypes = {"default": getattr(torch, dtype)}
    if kind is WanReference:
        dtypes["vae"] = torch.float32
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        folder, dtype=dtypes, local_files_only=True, **absent
    )
    return kind(pipeline.to("cuda" if CUDA else "cpu"))


def main(job_file: str, answer_file: str) -> None:
    job = Job(job_file, answer_file)
    dtype = getattr(torch, job.dtype)
    job.answer["device"] = torch.cuda.get_device_name() if CUDA else "cpu"
    job.answer["versions"] = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    job.answer["matmul_flops"] = [matmul_flops(job.matmul, dtype)]

    if not CUDA:
        keep_freed_memory()  # as jaxspd does
    begin = time.perf_counter()
    reference = open_reference(job.folder, job.dtype)
    job.answer["load"] = finish() - begin

    transformer = reference.pipeline.transformer
    forward = transformer.forward
    if job.framework != "eager":
        # Each size gets its own program, which is faster in PyTorch than one program for all sizes.
        forward = torch.compile(forward, dynamic=False)
    transformer.forward = clock = Clock(forward)

    def run(name: str, kind: str) -> tuple[torch.Tensor, float, float]:
        """The latents, and the times at which the run began and ended."""
        inputs, clock.times = Inputs(job.cells[name]["inputs"]), []
        text = [t for kind in ("positive", "negative") for t in texts(reference, inputs.text(kind))]
        begin = finish()
        latents = reference.denoise(inputs.noises(), *text, **job.cells[name][kind]["torch_options"])
        return latents, begin, finish()

    for name, measured in job.measured.items():
        known = len(get_compilation_metrics())
        _, begin, end = run(name, "warm")
        _, again, done = run(name, "warm")
        if job.framework != "eager":
            # The first run compiles, and does so again for each further size.
            measured["compile"] = (end - begin) - (done - again)
            compiled = get_compilation_metrics()[known:]
            measured["recompiles"] = sum(m.recompile_reason is not None for m in compiled)
    known = len(get_compilation_metrics())
    for name, measured in job.rounds():
        latents, begin, end = run(name, "run")
        measured["denoise"].append(clock.stages(begin, end, job.cells[name]["steps"]))
        job.keep(name, latents.cpu().numpy())
    job.answer["compiled_later"] = len(get_compilation_metrics()) - known
    job.answer["peak"] = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if CUDA:
        job.answer["peak"]["device"] = torch.cuda.max_memory_allocated()

    if job.encoders:
        job.answer["text"] = median_seconds(lambda: (reference.encode([job.prompt]), finish()), 3)
    job.answer["decode"] = median_seconds(lambda: (reference.decode(latents), finish()), 1)
    job.answer["matmul_flops"].append(matmul_flops(job.matmul, dtype))
    job.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
