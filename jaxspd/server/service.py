"""What the endpoints share: the model, the engine, stored files, and the way from a request to a job."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from starlette.requests import Request as HttpRequest

from jaxspd.errors import UsageError
from jaxspd.generator import DiffGenerator
from jaxspd.media.output import output_format
from jaxspd.planning import plan_request
from jaxspd.request import Request, SamplingParams
from jaxspd.resolving import resolve
from jaxspd.server.bodies import Ask
from jaxspd.server.engine import Engine, Job
from jaxspd.server.limits import Limits, Refused
from jaxspd.server.metrics import Metrics
from jaxspd.server.store import Store

# Seconds between signs of life to clients that wait for events.
PULSE = 10


class Service:
    """One model, served under the name `name`."""

    def __init__(self, generator: DiffGenerator, name: str, limits: Limits, prefix: str = ""):
        self.generator, self.name, self.limits = generator, name, limits
        self.family, self.created = generator.family, int(time.time())
        self.engine, self.store, self.metrics = (
            Engine(generator, limits),
            Store(limits.stored, prefix),
            Metrics(),
        )

    def model(self) -> dict:
        """The model in the form that OpenAI's clients read, with what the page needs."""
        height, width = self.family.default_size
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "jaxspd",
            "title": self.family.title,
            "family": self.family.name,
            "videos": self.family.default_fps is not None,
            "default_size": f"{width}x{height}",
            "pixel_multiple": self.family.pixel_multiple,
            "max_pixels": self.limits.pixels,
            "default_steps": self.family.default_steps,
        }

    def check_model(self, asked: str | None) -> None:
        """Raises Refused if another model is `asked` for."""
        if asked not in (None, self.name):
            reason = f"the model {asked!r} does not exist; this server has {self.name!r}"
            raise Refused(404, reason, code="model_not_found")

    def resolve(self, ask: Ask, *, picture: bool) -> Request:
        """The request that will run. Raises UsageError or Refused if it cannot run or exceeds a limit."""
        self.check_model(ask.model)
        params, family = dict(ask.params), self.family
        if picture and family.default_fps is not None:
            params.setdefault("num_frames", 1)
        if ask.seconds is not None and family.default_fps is not None:
            unit, rate = family.frames_per_latent, params.get("fps") or family.default_fps
            params["num_frames"] = round(ask.seconds * rate / unit) * unit + 1
        request = resolve(family, SamplingParams.from_mapping(params))
        if picture != (request.num_frames == 1):
            cure = (
                "ask for num_frames 1, or for a video at /v1/videos"
                if picture
                else f"{family.title} makes pictures, at /v1/images/generations"
                if family.default_fps is None
                else "ask for more frames, or for a picture at /v1/images/generations"
            )
            raise UsageError(f"this is not a request for a {'picture' if picture else 'video'}; {cure}")
        self.limits.check(request)
        plan_request(family, request)
        output_format(request.output_format, None, request.num_frames)
        return request

    def submit(self, request: Request, looks: int) -> tuple[Job, asyncio.Event]:
        """A job in the queue, and an event that is set in this thread at each of the job's changes."""
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def changed() -> None:
            with suppress(RuntimeError):  # the loop has ended, and so has the reader
                loop.call_soon_threadsafe(news.set)

        job = Job(request, self.limits.seconds, looks, changed)
        self.engine.submit(job)
        return job, news

    @asynccontextmanager
    async def submitted(
        self, http: HttpRequest, request: Request, looks: int = 0
    ) -> AsyncIterator[tuple[Job, Callable[[], Awaitable[bool]]]]:
        """A context with a job in the queue and a function that waits for its next change.

        The function returns False if the job is done or the client has disconnected, else True. It returns
        after `PULSE` seconds even without a change. If the context ends before the job, the job is cancelled.
        """
        job, news = self.submit(request, looks)
        gone = asyncio.ensure_future(_disconnected(http))

        async def change() -> bool:
            if job.done:
                return False
            waiting = asyncio.ensure_future(news.wait())
            try:
                await asyncio.wait({gone, waiting}, timeout=PULSE, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
            news.clear()
            if job.started is None and time.monotonic() > job.deadline:
                self.engine.cancel(job)
                job.refused = Refused(504, f"no turn came within {job.seconds:g} seconds; ask again later")
            return not gone.done()

        try:
            yield job, change
        finally:
            gone.cancel()
            if not job.done:
                self.engine.cancel(job)
            self.note(job)

    def note(self, job: Job) -> None:
        """Counts `job`, which has ended or was cancelled."""
        now, metrics = time.monotonic(), self.metrics
        metrics.queued.observe((job.started or now) - job.came)
        if job.started:
            metrics.made.observe((job.ended or now) - job.started)
        end = "cancelled" if job.cancelled else f"refused {job.refused.status}" if job.refused else "made"
        metrics.jobs.labels(end).inc()
        metrics.outputs.inc(len(job.outputs))
        metrics.together.inc(job.together > 1)


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
