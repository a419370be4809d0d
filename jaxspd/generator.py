"""From prompts to pictures and videos: plan, compile, encode, denoise, decode, write."""

import logging
import os
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxspd import processes
from jaxspd.borrowed import borrowed_spectrum
from jaxspd.components.denoiser import Denoiser
from jaxspd.components.pipeline import Components
from jaxspd.conditioning import conditionings
from jaxspd.convert.lora_file import LoraFile
from jaxspd.devices import Degrees, spread_over
from jaxspd.errors import UsageError
from jaxspd.files import lasting_model_path, lasting_path
from jaxspd.hub import fetch
from jaxspd.loras import Loras, Paths, Scales, of_each
from jaxspd.media.output import output_format, write_output
from jaxspd.models.attention import check_backend
from jaxspd.plan_report import plan_report
from jaxspd.planning import plan_request, reading
from jaxspd.progress import ProgressBar
from jaxspd.request import Request
from jaxspd.resolving import resolve
from jaxspd.results import GenerationResult, Output, Outputs, Progress, Watch, peak_memory, written
from jaxspd.running import run
from jaxspd.runtime.backend import start_backend
from jaxspd.runtime.cache import enable_compilation_cache
from jaxspd.sampling.loop import Step
from jaxspd.sampling.programs import peak_bytes
from jaxspd.shards import share
from jaxspd.source import Asked, Source
from jaxspd.spectral.plan import Plan
from jaxspd.target import Target
from jaxspd.tasks import Task, tasks, to_make
from jaxspd.together import ready, together

log = logging.getLogger("jaxspd")


class DiffGenerator:
    """A model. Make one with `from_pretrained`; call `generate` or `iterate` as often as needed, from several
    threads at once too.
    """

    def __init__(
        self,
        source: Source,
        components: Components,
        denoiser: Denoiser,
        lora_files: list[list[tuple[LoraFile, float]]],
    ):
        self.source, self.family = source, denoiser.family
        self._components, self._denoiser, self._lora_files = components, denoiser, lora_files
        self._residency = components.residency
        self._pool = ThreadPoolExecutor(1, "prepare")
        self._told = ""

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | os.PathLike | None = None,
        *,
        revision: str | None = None,
        dit_cpu_offload: bool = False,
        text_encoder_cpu_offload: bool | None = None,
        attention_backend: str | None = None,
        transformer_weights_path: str | os.PathLike | None = None,
        quantize: str | None = None,
        lora_path: Paths = None,
        lora_scale: Scales = None,
        lora_path_2: Paths = None,
        lora_scale_2: Scales = None,
        compilation_cache: bool = True,
        **devices: Any,
    ) -> "DiffGenerator":
        """Opens a pipeline: a local folder, a hub id, or without `model_path` the demo.

        `revision` is a hub id's branch, tag or commit. `dit_cpu_offload` keeps the weights of the
        transformer's layers in host memory; each comes to the device while the layer before it is at work.
        `text_encoder_cpu_offload` reads a text encoder's layers from their file, one after the other, for
        every batch of prompts; where it is false they stay on the device; unless it is given, they stay from
        the second batch on, where memory allows. `attention_backend` forces the transformer's attention:
        cudnn, splash or xla; unless it is given, the best that serves. `transformer_weights_path` is a file
        with a transformer for this pipeline, in safetensors or GGUF, that takes the place of the pipeline's
        own, whose weights then need not be there. `quantize` is int8 or fp8: the weights of the transformer's
        blocks are rounded to 8 bits as they are read, and multiplied so. `lora_path` names LoRAs, files or
        hub ids, that are merged into the weights as these are read, `lora_scale` times; `lora_path_2` and
        `lora_scale_2` those of the second transformer, where there are two. `compilation_cache`
        keeps compiled programs in the user's cache folder. `devices`, such as num_gpus=8, are fields of
        `devices.Degrees`, which says how many share the work. Other weights are read when the first output
        needs them, and stay. UsageError for a folder that cannot be used, what the hub does not give, a LoRA
        that does not fit, devices that are not there or not made use of, or a backend that cannot stream or
        has not that attention.
        """
        if compilation_cache:
            enable_compilation_cache()
        asked = Loras.of(lora_path, lora_scale), Loras.of(lora_path_2, lora_scale_2, "_2")
        weights_path, degrees = lasting_path(transformer_weights_path), Degrees(**devices)
        start_backend()
        opened = fetch(model_path, revision=revision, transformer_weights_path=weights_path)
        family = replace(opened, streamed=dit_cpu_offload, quantize=quantize)
        loras = of_each(family, *asked)
        files = [one.open() for one in loras]
        target = Target(attention_backend=attention_backend)
        platform = target.device.platform
        check_backend(attention_backend, platform)
        dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
        components = Components(family, dtype, text_encoder_cpu_offload, target, files[0])
        components.check()
        # The rest works on one device: it takes little of the time.
        spread = spread_over(target, family, dtype, degrees)
        denoiser = Denoiser(family, dtype, components.residency, files, spread)
        source = Source(lasting_model_path(model_path), revision, weights_path, quantize, loras)
        return cls(source, components, denoiser, files)

    def set_loras(
        self,
        lora_path: Paths = None,
        lora_scale: Scales = None,
        lora_path_2: Paths = None,
        lora_scale_2: Scales = None,
    ) -> None:
        """Merges these LoRAs instead of those that were, or none. Only weights that either change are made
        anew, of what was kept of them in the host's memory, or where there was no room, of their files. Not
        to be called while another thread makes outputs. UsageError, before anything is changed, for a LoRA
        that does not fit.
        """
        given = Loras.of(lora_path, lora_scale), Loras.of(lora_path_2, lora_scale_2, "_2")
        loras = of_each(self.family, *given)
        files, before = [one.open() for one in loras], self._lora_files
        self._components.set_loras(files[0])
        try:
            self._denoiser.set_loras(files)
        except UsageError:
            self._components.set_loras(before[0])
            raise
        self.source, self._lora_files = replace(self.source, loras=loras), files

    def plan(self, params: Asked) -> Plan:
        """The stages `params` would run."""
        return plan_request(self.family, self.source.params(params))

    def generate(
        self,
        sampling_params_kwargs: Asked,
        *,
        save_output: bool = True,
        skip_existing: bool = False,
        shard: str | None = None,
        show_progress: bool = True,
    ) -> GenerationResult:
        """A picture or video for every prompt, all of them held in the result: `iterate`, gathered.

        `sampling_params_kwargs` is `SamplingParams` or a mapping of its fields. Raises UsageError before
        anything is computed if the request cannot be served.
        """
        outputs = self.iterate(
            sampling_params_kwargs,
            save_output=save_output,
            skip_existing=skip_existing,
            shard=shard,
            show_progress=show_progress,
        )
        frames = [output.frames for output in outputs]
        return replace(outputs.result, frames=frames)

    def iterate(
        self,
        params: Asked,
        *,
        save_output: bool = True,
        skip_existing: bool = False,
        shard: str | None = None,
        show_progress: bool = True,
        watch: Watch | None = None,
    ) -> Outputs:
        """The same one by one: each output is made when it is asked for, written to `output_path` unless
        `save_output` is false, and then forgotten here, so that memory does not grow with their number. Of
        several processes the first decodes, writes and is watched; others' outputs have no frames.

        `skip_existing` leaves out those whose file exists and says that it was made by the same request; if
        that is all of them, nothing is loaded. `shard`, "I/N", makes the I-th of every N outputs, so that N
        machines share the work; their names do not depend on it. `watch` is told of every step; what it
        raises ends the run. Raises UsageError at once, not at the first output, if the request cannot be
        served, and at an output that cannot be written, with how many are.
        """
        own_share = share(shard)
        request = processes.told(lambda: resolve(self.family, self.source.params(params)))
        kind = output_format(request.output_format, request.output_file_name, request.num_frames)
        request = replace(request, output_format=kind)
        every = tasks(self.family, request, self.source.report, save_output)[own_share]
        plan = plan_request(self.family, request)
        notice = borrowed_spectrum(self.family, request, plan)
        if notice and notice != self._told:  # once for a model, not for every request
            log.warning(notice)
            self._told = notice
        todo = processes.told(partial(to_make, every, skip_existing))
        paths = [task.path for task in todo if task.path]
        result = GenerationResult(
            frames=[],
            requests=[],
            plan=plan_report(reading(self.family, request), plan),
            seconds={"encode": 0.0, "load": 0.0, "compile": 0.0}
            | {"denoise": [0.0] * len(plan.stages), "decode": 0.0},
            programs=0,
            peak_memory=peak_memory(self._residency.target.device),
            resident=self._resident(),
            skipped=[task.path for task in every if task.path and task.path not in paths],
        )
        made = self._make(request, plan, todo, len(every), result, show_progress, watch)
        return Outputs(result, len(every), paths, made)

    def _make(
        self,
        request: Request,
        plan: Plan,
        todo: list[Task],
        asked: int,
        result: GenerationResult,
        show_progress: bool,
        watch: Watch | None,
    ) -> Generator[Output, None, None]:
        """Makes the outputs of `todo`, and keeps count of them in `result`."""
        if not todo:
            return
        family, seconds = reading(self.family, request), result.seconds
        leading, waiting = family.leading(request.num_frames), True
        loading = self._denoiser.load()
        programs, prepared, result.programs = self._denoiser.prepare(family, request, plan)
        if self._denoiser.place == "device":
            # The text encoder takes what the weights leave of the device's memory, not the other way round.
            loading.result()
        by_prompt = [list(group) for _, group in groupby(todo, lambda task: task.prompt)]
        texts = [first.request["prompt"] + first.request["prompt_suffix"] for first, *_ in by_prompt]
        conditioned = conditionings(self._components, family, texts, request, seconds)
        first = processes.first()
        with ProgressBar(plan, len(todo), show_progress and first) as progress:
            tell = partial(self._tell, progress, watch, plan)
            for group, conditioning in zip(by_prompt, conditioned, strict=True):
                if waiting:  # the first texts are encoded meanwhile
                    # Nothing here holds the weights, which may have to give way to others.
                    waiting, seconds["load"], loading = False, loading.result()[1], None
                    seconds["compile"] = programs.wait(prepared)
                    self._residency.leave(peak_bytes(prepared))
                    # While the device is at work. What fails is told when it is tried again, to decode.
                    if first:
                        self._pool.submit(self._components.prepare, (1, *leading, *plan.stages[-1].latent))
                    progress.begin()
                for task in group:
                    one = programs, plan, request, conditioning, [task], tell
                    [output] = run(self._components, self._denoiser, *one)
                    if task.path:
                        try:
                            if first:
                                with processes.writing:
                                    write_output(task.path, output.frames, task.request, request.fps)
                        except (UsageError, OSError) as error:
                            raise UsageError(f"{error}; {written(result, asked)}") from error
                        result.paths.append(task.path)
                    result.requests.append(task.request)
                    seconds["denoise"] = np.add(seconds["denoise"], output.seconds["denoise"]).tolist()
                    seconds["decode"] += output.seconds["decode"]
                    result.peak_memory = peak_memory(self._residency.target.device)
                    result.resident = self._resident()
                    yield output
                    del output  # else its frames would lie in memory beside the next

    def ready_together(self, request: Request, count: int) -> bool:
        """`together.ready` of this model."""
        return ready(self._denoiser, request, count)

    def together(self, requests: Sequence[Request], watches: Sequence[Watch]) -> Iterator[Output]:
        """An output of each of `requests`, made in one batch: `together.together` of this model."""
        return together(self._components, self._denoiser, self.source, requests, watches)

    def _tell(self, bar: ProgressBar, watch: Watch | None, plan: Plan, step: Step) -> None:
        bar(step)
        if watch and processes.first():
            watch(Progress(plan, step, self._components.preview))

    def _resident(self) -> dict[str, str]:
        """Component -> where it stays in memory for the next call."""
        places = self._residency.places()
        return dict(sorted((places | self._denoiser.places).items()))
