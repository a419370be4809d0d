"""From prompts to pictures and videos: plan, compile, encode, denoise, decode, write."""

import resource
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxspd.convert.orbax_store import check_transformer, load_transformer
from jaxspd.errors import UsageError
from jaxspd.families import TORCH
from jaxspd.families.checks import check_modules
from jaxspd.files import lasting_model_path
from jaxspd.hub import fetch
from jaxspd.output import check_writable, output_format, output_paths, write_output
from jaxspd.params import SamplingParams
from jaxspd.planning import complete, plan_report, plan_request, reading
from jaxspd.sampling.backend import start_backend
from jaxspd.sampling.cache import enable_compilation_cache
from jaxspd.sampling.guidance import Guided, guide
from jaxspd.sampling.layerwise import HOST
from jaxspd.sampling.loop import denoise
from jaxspd.sampling.memory import memory_for
from jaxspd.sampling.noise import stage_noises
from jaxspd.sampling.programs import Programs
from jaxspd.sampling.solvers import SOLVERS
from jaxspd.spectral.plan import Plan


@dataclass
class GenerationResult:
    """Pictures or videos of one call, and what making them took.

    `frames` holds an array `[F, H, W, 3]`, uint8, for each output, a picture's F being 1, and `requests`
    its complete parameters; `seconds` the time of `compile` (waiting for it after everything else was
    ready), `load`, `encode`, `denoise` (a list, one entry a stage, summed over outputs) and `decode`;
    `programs` the step programs newly compiled; `peak_memory` the process's and, where the backend
    tells, the device's peak in bytes.
    """

    frames: list[np.ndarray]
    requests: list[dict[str, Any]]
    plan: dict[str, Any]
    seconds: dict[str, Any]
    programs: int
    peak_memory: dict[str, int]
    paths: list[Path] = field(default_factory=list)

    @property
    def images(self) -> list[Image.Image]:
        """The pictures, or the videos' first frames."""
        return [Image.fromarray(frames[0]) for frames in self.frames]

    def report(self) -> dict[str, Any]:
        """Everything but the pixels, for JSON."""
        values = {k: v for k, v in vars(self).items() if k not in ("frames", "requests", "paths")}
        outputs = [
            {"path": str(path), **request}
            for path, request in zip(self.paths or [None] * len(self.frames), self.requests, strict=True)
        ]
        return {"outputs": outputs, **values}


class DiffGenerator:
    """A loaded model. Make one with `from_pretrained`; call `generate` as often as needed, from several
    threads at once too.
    """

    def __init__(self, model_path: str | None, dit_cpu_offload: bool, revision: str | None = None):
        self.model_path = lasting_model_path(model_path)
        self.revision = revision
        start_backend()
        family = fetch(model_path, revision=revision)
        family.check_weights()
        if dit_cpu_offload and HOST not in (m.kind for m in jax.devices()[0].addressable_memories()):
            raise UsageError(
                f"JAX's {jax.default_backend()} backend streams nothing from host memory; leave "
                "dit_cpu_offload out"
            )
        self.family = family = replace(family, streamed=dit_cpu_offload)
        self.dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        self._velocity = family.velocity_function(self.dtype)
        self._programs: dict[tuple[str, str], Programs] = {}
        self._lock = Lock()
        self._abstract = family.abstract_parameters(self.dtype)
        check_transformer(family.folder, self._abstract, family.rules)
        self._modules_checked = False
        self._pool = ThreadPoolExecutor(1, "load")
        self._loading = self._pool.submit(self._load)

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | None = None,
        *,
        revision: str | None = None,
        dit_cpu_offload: bool = False,
        compilation_cache: bool = True,
    ) -> "DiffGenerator":
        """Opens a pipeline: a local folder, a hub id, or without `model_path` the demo.

        `revision` is a hub id's branch, tag or commit. `dit_cpu_offload` keeps the weights of the
        transformer's layers in host memory; each comes to the device while the layer before it is at work.
        `compilation_cache` keeps compiled programs in the user's cache folder. Weights go on loading after
        this returns; UsageError for a folder that cannot be used, what the hub does not give, or a backend
        that cannot stream.
        """
        if compilation_cache:
            enable_compilation_cache()
        return cls(model_path, dit_cpu_offload, revision)

    def _load(self):
        begin = time.perf_counter()
        with memory_for(f"{self.family.title}'s transformer", "use dit_cpu_offload, or a smaller model"):
            parameters = load_transformer(self.family.folder, self._abstract, self.family.rules)
            return jax.block_until_ready(parameters), time.perf_counter() - begin

    def _loaded(self):
        """The parameters, when they are there, and the seconds that loading took; a load that failed is tried
        again the next time, since memory that it lacked may be free by then.
        """
        with self._lock:
            if self._loading.done() and self._loading.exception():
                self._loading = self._pool.submit(self._load)
            loading = self._loading
        return loading.result()

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
        """A picture or video for every prompt, written to `output_path` unless `save_output` is false.

        `sampling_params_kwargs` holds fields of `SamplingParams`. Raises UsageError before anything
        is computed if the request cannot be served.
        """
        params = complete(self.family, SamplingParams.from_mapping(sampling_params_kwargs))
        kind = output_format(params.output_format, params.output_file_name, params.num_frames)
        params = replace(params, output_format=kind)
        requests = self._requests(params)
        plan = self.plan(params)
        paths = []
        if save_output:
            paths = output_paths(params.output_path, params.output_file_name, requests, kind)
            check_writable(paths)

        programs = self._programs_for(params)
        compiled_before = programs.compiled_steps
        family = reading(self.family, params)
        guided = family.guided(params.guidance_scale)
        leading = family.leading(params.num_frames)
        one = conditioning = family.abstract_conditioning(1)
        if guided:
            conditioning = Guided(one, one, jax.ShapeDtypeStruct((1,), jnp.float32))
        prepared = programs.prepare(plan, (1, *leading), self._abstract, conditioning)
        if jax.default_backend() != "cpu":
            # The text encoder takes what the weights leave of the device's memory, not the other way round.
            self._loaded()
        seconds: dict[str, Any] = {}
        begin = time.perf_counter()
        if not self._modules_checked:
            check_modules(self.family)
            self._modules_checked = True
        # The negative prompt, one for all, comes last.
        with TORCH, memory_for("reading the prompt", "use a machine with more memory, or fewer prompts"):
            encoded = family.encode(params.prompts + [params.negative_prompt] * guided)
        seconds["encode"] = time.perf_counter() - begin
        parameters, seconds["load"] = self._loaded()
        seconds["compile"] = programs.wait(prepared)

        latents, stage_seconds = [], np.zeros(len(plan.stages))
        with _ProgressBar(plan, len(requests), show_progress) as progress:
            for number, request in enumerate(requests):
                clean, taken = denoise(
                    programs,
                    plan,
                    parameters,
                    self._conditioning(
                        encoded, number // params.num_outputs_per_prompt, params.guidance_scale
                    ),
                    self._noises(programs, plan, request["seed"], leading),
                    progress,
                )
                latents.append(np.asarray(clean))
                stage_seconds += taken
        seconds["denoise"] = stage_seconds.tolist()

        begin = time.perf_counter()
        with TORCH, memory_for(f"decoding {params.width}×{params.height} pixels"):
            frames = list(self.family.decode(np.concatenate(latents)))
        seconds["decode"] = time.perf_counter() - begin
        result = GenerationResult(
            frames=frames,
            requests=requests,
            plan=plan_report(family, plan),
            seconds=seconds,
            programs=programs.compiled_steps - compiled_before,
            peak_memory=peak_memory(),
            paths=paths,
        )
        for path, video, request in zip(paths, frames, requests, strict=False):
            write_output(path, video, request, params.fps)
        return result

    def _programs_for(self, params: SamplingParams) -> Programs:
        """The compiled programs that the solver and the grid asked for share."""
        key, combine = (params.scheduler, params.progressive_grid), self.family.combine
        with self._lock:
            if key not in self._programs:
                self._programs[key] = Programs(
                    guide(self._velocity, combine, batched=True),
                    SOLVERS[params.scheduler],
                    guide(self._velocity, combine, batched=False),
                    self.family.expansions[params.progressive_grid],
                )
            return self._programs[key]

    @staticmethod
    def _noises(programs: Programs, plan: Plan, seed: int, leading: tuple[int, ...]) -> list:
        """Each stage's noise for one output."""
        grids = [stage.latent for stage in plan.stages]
        if plan.noise == "shared":
            return programs.share(plan, stage_noises([seed], leading, grids[-1:])[0])
        return stage_noises([seed], leading, grids)

    def _conditioning(self, encoded: dict[str, np.ndarray], row: int, scale: float):
        """The denoiser's conditioning for one prompt of those encoded."""

        def rows(start: int) -> Any:
            one = {name: array[start:][:1] for name, array in encoded.items()}
            return self.family.condition(one, scale)

        with np.errstate(over="ignore"):  # what is too large for float32 shows in the latents
            if not self.family.guided(scale):
                return rows(row)
            return Guided(rows(row), rows(-1), np.full(1, scale, np.float32))

    def _requests(self, params: SamplingParams) -> list[dict[str, Any]]:
        """Each output's complete parameters: what its file holds and what repeats it."""
        if not params.prompts:
            raise UsageError("a prompt is needed; say what to show")
        common = asdict(replace(params, num_outputs_per_prompt=1))
        del common["output_path"], common["output_file_name"]
        if self.model_path is not None:
            common["model_path"] = self.model_path
        if self.revision is not None:
            common["revision"] = self.revision
        return [
            {**common, "prompt": prompt, "seed": params.seed + number}
            for prompt in params.prompts
            for number in range(params.num_outputs_per_prompt)
        ]


class _ProgressBar:
    """Steps done, with stage, grid and σ."""

    def __init__(self, plan: Plan, pictures: int, shown: bool):
        self.plan = plan
        self.bar = tqdm(total=plan.steps * pictures, disable=not shown, unit="step", file=sys.stderr)

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        self.bar.leave = error is None  # an error's line stands alone
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
