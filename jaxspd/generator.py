"""From prompts to pictures: encode, plan, compile, denoise, decode, write."""

import resource
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from convert.orbax_store import load_transformer
from jaxspd.errors import UsageError
from jaxspd.families import open_family
from jaxspd.hub import model_folder
from jaxspd.output import check_writable, picture_paths, write_png
from jaxspd.params import SamplingParams
from jaxspd.planning import plan_report, plan_request
from jaxspd.sampling.cache import enable_compilation_cache
from jaxspd.sampling.loop import denoise
from jaxspd.sampling.noise import stage_noises
from jaxspd.sampling.programs import Programs
from jaxspd.sampling.solvers import euler
from jaxspd.spectral.plan import Plan


@dataclass
class GenerationResult:
    """Pictures of one call, and what making them took.

    `requests` holds each picture's complete parameters; `seconds` the time of `compile` (waiting for
    it after everything else was ready), `load`, `encode`, `denoise` (a list, one entry a stage, summed
    over pictures) and `decode`; `programs` the step programs newly compiled; `peak_memory` the
    process's and, where the backend tells, the device's peak in bytes.
    """

    images: list[Image.Image]
    requests: list[dict[str, Any]]
    plan: dict[str, Any]
    seconds: dict[str, Any]
    programs: int
    peak_memory: dict[str, int]
    paths: list[Path] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """Everything but the pixels, for JSON."""
        values = {k: v for k, v in vars(self).items() if k not in ("images", "requests", "paths")}
        pictures = [
            {"path": str(path), **request}
            for path, request in zip(self.paths or [None] * len(self.images), self.requests, strict=True)
        ]
        return {"outputs": pictures, **values}


class DiffGenerator:
    """A loaded model. Make one with `from_pretrained`; call `generate` as often as needed."""

    def __init__(self, model_path: str | None, dit_cpu_offload: bool):
        self.model_path = model_path
        self.family = family = open_family(model_folder(model_path))
        family.check_weights()
        self.dit_cpu_offload = dit_cpu_offload
        self.dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        self.programs = Programs(family.velocity_function(self.dtype), euler)
        self._abstract = family.abstract_parameters(self.dtype)
        self._home = jax.devices("cpu" if dit_cpu_offload else None)[0]
        self._pool = ThreadPoolExecutor(1, "load")
        self._loading = self._pool.submit(self._load)

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | None = None,
        *,
        dit_cpu_offload: bool = False,
        compilation_cache: bool = True,
    ) -> "DiffGenerator":
        """Opens a pipeline: a local folder, a hub id, or without `model_path` the demo.

        `dit_cpu_offload` keeps the transformer's weights in host memory and lends them to the device
        while it denoises. `compilation_cache` keeps compiled programs in the user's cache folder.
        Weights go on loading after this returns; UsageError for a folder that cannot be used.
        """
        if compilation_cache:
            enable_compilation_cache()
        return cls(model_path, dit_cpu_offload)

    def _load(self):
        begin = time.perf_counter()
        parameters = load_transformer(
            self.family.folder,
            self._abstract,
            self.family.rules,
            lambda array: jax.device_put(array, self._home),
        )
        return jax.block_until_ready(parameters), time.perf_counter() - begin

    def plan(self, params: SamplingParams) -> Plan:
        """The stages `params` would run."""
        return plan_request(self.family, params)

    def generate(
        self,
        sampling_params_kwargs: Mapping[str, Any],
        *,
        save_output: bool = True,
        show_progress: bool = True,
    ) -> GenerationResult:
        """Pictures for every prompt, written to `output_path` unless `save_output` is false.

        `sampling_params_kwargs` holds fields of `SamplingParams`. Raises UsageError before anything
        is computed if the request cannot be served.
        """
        params = SamplingParams.from_mapping(sampling_params_kwargs)
        requests = self._requests(params)
        plan = self.plan(params)
        self.family.check_negative_prompt(params.negative_prompt)
        paths = []
        if save_output:
            paths = picture_paths(params.output_path, params.output_file_name, requests)
            check_writable(paths)

        compiled_before = self.programs.compiled_steps
        shape = (1, self.family.channels)
        self.programs.prepare(plan, shape, self._abstract, self.family.abstract_conditioning(1))
        seconds: dict[str, Any] = {}
        begin = time.perf_counter()
        encoded = self.family.encode(params.prompts)
        seconds["encode"] = time.perf_counter() - begin
        parameters, seconds["load"] = self._loading.result()
        seconds["compile"] = self.programs.wait()
        if self.dit_cpu_offload:
            parameters = jax.device_put(parameters, jax.devices()[0])

        latents, stage_seconds = [], np.zeros(len(plan.stages))
        with self._progress_bar(plan, len(requests), show_progress) as progress:
            for number, request in enumerate(requests):
                row = number // params.num_outputs_per_prompt
                clean, taken = denoise(
                    self.programs,
                    plan,
                    parameters,
                    self.family.condition(
                        {name: array[row : row + 1] for name, array in encoded.items()},
                        request["guidance_scale"],
                    ),
                    stage_noises(
                        [request["seed"]],
                        self.family.channels,
                        [stage.latent for stage in plan.stages],
                    ),
                    progress,
                )
                latents.append(np.asarray(clean))
                stage_seconds += taken
        del parameters
        seconds["denoise"] = stage_seconds.tolist()

        begin = time.perf_counter()
        images = [Image.fromarray(p) for p in self.family.decode(np.concatenate(latents))]
        seconds["decode"] = time.perf_counter() - begin
        result = GenerationResult(
            images=images,
            requests=requests,
            plan=plan_report(self.family, plan),
            seconds=seconds,
            programs=self.programs.compiled_steps - compiled_before,
            peak_memory=peak_memory(),
            paths=paths,
        )
        for path, image, request in zip(paths, images, requests, strict=False):
            write_png(path, image, request)
        return result

    def _requests(self, params: SamplingParams) -> list[dict[str, Any]]:
        """Each picture's complete parameters, the checkpoint's defaults filled in: what its PNG holds
        and what repeats it.
        """
        if not params.prompts:
            raise UsageError("a prompt is needed; say what the picture should show")
        height, width = self.family.default_size
        complete = asdict(
            replace(
                params,
                num_inference_steps=params.num_inference_steps or self.family.default_steps,
                guidance_scale=self.family.default_guidance
                if params.guidance_scale is None
                else params.guidance_scale,
                height=params.height or height,
                width=params.width or width,
                num_outputs_per_prompt=1,
            )
        )
        del complete["output_path"], complete["output_file_name"]
        if self.model_path is not None:
            complete["model_path"] = str(self.model_path)
        return [
            {**complete, "prompt": prompt, "seed": params.seed + number}
            for prompt in params.prompts
            for number in range(params.num_outputs_per_prompt)
        ]

    def _progress_bar(self, plan: Plan, pictures: int, shown: bool) -> "_ProgressBar":
        return _ProgressBar(plan, pictures, shown)


class _ProgressBar:
    """Steps done, with stage, grid and σ."""

    def __init__(self, plan: Plan, pictures: int, shown: bool):
        self.plan = plan
        self.bar = tqdm(total=plan.steps * pictures, disable=not shown, unit="step", file=sys.stderr)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def __call__(self, stage: int, step: int, sigma: float) -> None:
        h, w = self.plan.stages[stage].latent
        self.bar.set_description_str(
            f"stage {stage + 1}/{len(self.plan.stages)} · {h}×{w} · σ {sigma:.3f}", refresh=False
        )
        self.bar.update()


def peak_memory() -> dict[str, int]:
    """Peak bytes of this process and, where the backend tells, of the device."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return peak | ({"device": device} if device else {})
