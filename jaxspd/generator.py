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
from jaxspd.devices import Degrees, say_layout, spread_over
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
    """A model, which `from_pretrained` opens.

    `generate` and `iterate` may be called as often as needed, also from several threads at once.
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
        """Opens a pipeline: a local folder, a hub id, or the demo if there is no `model_path`.

        - `revision` is a hub id's branch, tag or commit.
        - `dit_cpu_offload` keeps the weights of the transformer's layers in host memory. Each layer's weights
          come to the device while the layer before it runs.
        - `text_encoder_cpu_offload` reads a text encoder's layers from their file, one after the other, for
          every batch of prompts. False keeps them on the device. By default they are kept from the second
          batch on, if there is room.
        - `attention_backend` forces the transformer's attention: cudnn, splash or xla. By default it is the
          best one that the device has.
        - `transformer_weights_path` is a safetensors or GGUF file with a transformer, which replaces the
          pipeline's own. The pipeline's transformer weights need not be there then.
        - `quantize` is int8 or fp8. It rounds the weights of the transformer's blocks to 8 bits as they are
          read, and multiplies them in 8 bits.
        - `lora_path` names LoRAs, which are files or hub ids. They are merged into the weights as these are
          read, with the strengths `lora_scale`. `lora_path_2` and `lora_scale_2` are for the second of two
          transformers.
        - `compilation_cache` keeps compiled programs in the user's cache folder.
        - `devices`, such as num_gpus=8, are fields of `devices.Degrees`, the devices that share the work.

        The transformer's weights are read when the first output needs them, and stay. Raises UsageError for a
        folder that cannot be used, a failed download, a LoRA that does not fit, missing or unused devices,
        and a device that cannot stream or lacks the attention backend.
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
        spread = spread_over(target, family, dtype, degrees)
        components = Components(family, dtype, text_encoder_cpu_offload, spread.own, files[0])
        components.check()
        denoiser = Denoiser(family, dtype, components.residency, files, spread)
        say_layout(spread, family, dtype)
        source = Source(lasting_model_path(model_path), revision, weights_path, quantize, loras)
        return cls(source, components, denoiser, files)

    def set_loras(
        self,
        lora_path: Paths = None,
        lora_scale: Scales = None,
        lora_path_2: Paths = None,
        lora_scale_2: Scales = None,
    ) -> None:
        """Merges these LoRAs in place of the current ones, or none if none are given.

        Only weights that the old or the new LoRAs change are made again. They are made from copies in host
        memory, or from their files if there was no room for copies. Do not call this while another thread
        makes outputs. Raises UsageError, before anything is changed, for a LoRA that does not fit.
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
        """The plan that `params` would run. Raises UsageError if the request is impossible."""
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
        """Makes all pictures or videos of a request, and returns them together.

        `sampling_params_kwargs` is `SamplingParams` or a mapping of its fields. The other arguments are those
        of `iterate`. Raises UsageError, before anything is computed, if the request cannot be served.
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
        """Makes the pictures or videos of a request one by one.

        Each output is made when the iterator is asked for it. It is written to `output_path`, unless
        `save_output` is false. The generator does not keep it, so memory does not grow with their number. If
        several processes work together, only the first decodes, writes and calls `watch`. The others' outputs
        have no frames.

        `skip_existing` leaves out outputs whose file exists and was made by the same request. If no others
        are left, nothing is loaded. `shard`, "I/N", makes the I-th of every N outputs, so that N machines can
        share the work. The files' names do not depend on it. `watch` is called with every step's progress,
        and an exception from it ends the run.

        Raises UsageError at once, not at the first output, if the request cannot be served. Later it raises
        UsageError, which says how many outputs are written, if one cannot be made or written.
        """
        own_share = share(shard)
        request = processes.told(lambda: resolve(self.family, self.source.params(params)))
        kind = output_format(request.output_format, request.output_file_name, request.num_frames)
        request = replace(request, output_format=kind)
        every = tasks(self.family, request, self.source.report, save_output)[own_share]
        plan = plan_request(self.family, request)
        notice = borrowed_spectrum(self.family, request, plan)
        if notice and notice != self._told:  # one notice for a model, not for every request
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
        """Makes the outputs of `todo`, and records them in `result`."""
        if not todo:
            return
        family, seconds = reading(self.family, request), result.seconds
        leading, waiting = family.leading(request.num_frames), True
        loading = self._denoiser.load()
        programs, prepared, result.programs = self._denoiser.prepare(family, request, plan)
        if self._denoiser.place == "device":
            # The weights have first claim on the device's memory. The text encoder takes what they leave.
            loading.result()
        by_prompt = [list(group) for _, group in groupby(todo, lambda task: task.prompt)]
        texts = [first.request["prompt"] + first.request["prompt_suffix"] for first, *_ in by_prompt]
        conditioned = conditionings(self._components, family, texts, request, seconds)
        first = processes.first()
        with ProgressBar(plan, len(todo), show_progress and first) as progress:
            tell = partial(self._tell, progress, watch, plan)
            for group, conditioning in zip(by_prompt, conditioned, strict=True):
                if waiting:  # the first texts are encoded by now
                    # Nothing here holds the weights, since other weights may need their room.
                    waiting, seconds["load"] = False, loading.result()[1]
                    del loading
                    seconds["compile"] = programs.wait(prepared)
                    self._residency.leave(peak_bytes(prepared))
                    # The decoder is prepared while the device denoises. If that fails, decoding reports it.
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
                    del output  # otherwise its frames would stay in memory beside the next ones

    def ready_together(self, request: Request, count: int) -> bool:
        """`together.ready` for this model."""
        return ready(self._denoiser, request, count)

    def together(self, requests: Sequence[Request], watches: Sequence[Watch]) -> Iterator[Output]:
        """Makes an output for each of `requests` in one batch: `together.together` for this model."""
        return together(self._components, self._denoiser, self.source, requests, watches)

    def _tell(self, bar: ProgressBar, watch: Watch | None, plan: Plan, step: Step) -> None:
        bar(step)
        if watch and processes.first():
            watch(Progress(plan, step, self._components.preview))

    def _resident(self) -> dict[str, str]:
        """For each component that stays in memory for the next call, by name: "host" or "device"."""
        places = self._residency.places()
        return dict(sorted((places | self._denoiser.places).items()))
