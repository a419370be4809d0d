"""A queue of jobs, and one thread that uses the generator."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from threading import Condition, Thread

import numpy as np

from jaxspd.errors import UsageError
from jaxspd.generator import DiffGenerator
from jaxspd.request import Request
from jaxspd.results import Output, Progress
from jaxspd.server.batches import Batches
from jaxspd.server.limits import Limits, Refused

log = logging.getLogger("jaxspd.server")


class Ended(Exception):
    """A job must not go on."""


@dataclass(frozen=True)
class Look:
    """A preview, after a step, of the picture that an output is heading for.

    `pixels` `[h, w, 3]`, uint8, show a video's middle frame. `index` numbers the looks at one output.
    `output`, `stage` and `step` are numbered from 0, as is `index`. `stages` and `steps` are the numbers of
    all stages and steps. `sigma` is the noise level after the step.
    """

    pixels: np.ndarray
    index: int
    output: int
    stage: int
    stages: int
    step: int
    steps: int
    sigma: float


class Job:
    """A request that waits or is being made. It ends with an error after `seconds`.

    The engine's thread calls `changed` after every change: a new entry of `looks` or `outputs`, or the end.
    `done` says that the job has ended; `refused` is the reason if it failed. `count` is the number of looks
    at each output. Until looks are taken out, only the newest of each stage is kept. `together` is the number
    of jobs in its batch.
    """

    def __init__(
        self, request: Request, seconds: float, count: int = 0, changed: Callable[[], None] = lambda: None
    ):
        self.request, self._count, self.changed = request, count, changed
        self.came = time.monotonic()
        self.started: float | None = None
        self.ended: float | None = None
        self.deadline, self.seconds = self.came + seconds, seconds
        self.looks: deque[Look] = deque()
        self._looked = 0
        self.outputs: list[Output] = []
        self.progress, self.cancelled, self.done = 0.0, False, False
        self.refused: Refused | None = None
        self.together = 1

    def watch(self, progress: Progress) -> None:
        """Records a step; called by the generator after each step."""
        self.check()
        step, steps, made = progress.step, progress.plan.steps, len(self.outputs)
        self.progress = (made + (step.number + 1) / steps) / self.request.num_outputs_per_prompt
        if progress.due(self._count):
            frames = progress.preview()
            where = made, step.stage, len(progress.plan.stages), step.number, steps, step.reached
            look = Look(frames[len(frames) // 2], self._looked, *where)
            with suppress(IndexError):
                last = self.looks.pop()
                if (last.output, last.stage) != (look.output, look.stage):
                    self.looks.append(last)
            self.looks.append(look)
            self._looked += 1
            self.changed()

    @property
    def seconds_made(self) -> dict[str, float]:
        """How long it was in the queue and in the making, up to now or to its end."""
        now = time.monotonic()
        started = self.started or now
        return {"queued": started - self.came, "made": (self.ended or now) - started}

    def add(self, output: Output) -> None:
        self._looked = 0
        self.outputs.append(output)
        self.changed()

    def check(self) -> None:
        """Raises Ended if the job is cancelled, and Refused if its time is up."""
        if self.cancelled:
            raise Ended
        if time.monotonic() > self.deadline:
            raise Refused(504, f"this took longer than {self.seconds:g} seconds; ask for less, or later")

    def end(self, refused: Refused | None = None) -> None:
        self.refused, self.done, self.ended = refused, True, time.monotonic()
        self.changed()


class Engine:
    """Makes jobs in the order of arrival. Jobs of one shape are made together where that is faster."""

    def __init__(self, generator: DiffGenerator, limits: Limits):
        self.generator, self.limits, self.stopping = generator, limits, False
        self.current: list[Job] = []
        self._waiting: deque[Job] = deque()
        self._batches = Batches(generator, limits.batch_size)
        self._news = Condition()
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """The number of jobs that have not begun."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Puts `job` into the queue. Raises Refused if the queue is full or the server is stopping."""
        with self._news:
            if self.stopping:
                raise Refused(503, "the server is stopping; ask again", retry=5)
            if len(self._waiting) >= self.limits.queue:
                raise Refused(
                    429, f"{len(self._waiting)} requests are waiting already; ask again later", retry=5
                )
            self._waiting.append(job)
            self._news.notify()

    def cancel(self, job: Job) -> None:
        """Cancels `job`: at once if it waits, else before its next step."""
        job.cancelled = True
        with self._news:
            if job in self._waiting:
                self._waiting.remove(job)
                job.end()

    def stop(self, now: bool = False) -> None:
        """Accepts no more jobs and refuses those that wait. Jobs that are being made go on, unless `now`."""
        with self._news:
            self.stopping = True
            waiting, self._waiting = [*self._waiting], deque()
            self._news.notify()
        for job in waiting:
            job.end(Refused(503, "the server is stopping; ask again", retry=5))
        for job in self.current if now else ():
            job.cancelled = True

    def check_alive(self) -> None:
        """Raises RuntimeError if the engine's thread has ended although nobody called `stop`."""
        if not self._thread.is_alive() and not self.stopping:
            raise RuntimeError("the engine's thread has ended")

    def join(self, seconds: float | None = None) -> None:
        """Waits until the last job after a `stop` has ended, or for `seconds`."""
        self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._waiting or self.stopping)
                if not self._waiting:
                    return
                first = self._waiting.popleft()
                waiting = [*self._waiting]
                places = self._batches.choose(first.request, [job.request for job in waiting])
                jobs = self.current = [first, *(waiting[place] for place in places)]
                self._waiting = deque(job for job in waiting if job not in jobs)
            for job in jobs:
                job.started = time.monotonic()
            self._make(jobs)
            self.current = []
            del jobs, job, first, waiting  # else their outputs would stay in memory until the next job

    def _make(self, jobs: list[Job]) -> None:
        """Makes and ends `jobs`. If several cannot be made together, each is made alone."""
        begin, count, request = time.monotonic(), len(jobs), jobs[0].request
        for job in jobs:
            job.together = count
        refused = self._refused(self._alone if count == 1 else self._together, jobs)
        if count == 1:
            jobs[0].end(refused)
        if refused is None:
            if all(job.outputs for job in jobs):
                self._batches.note(request, count, time.monotonic() - begin)
        elif count > 1:
            log.warning("%d requests are made one after the other (%s)", count, refused)
            self._batches.note(request, count, math.inf)
            for job in jobs:
                if not job.done:
                    self._make([job])

    def _alone(self, jobs: list[Job]) -> None:
        [job] = jobs
        job.check()
        made = self.generator.iterate(job.request, save_output=False, show_progress=False, watch=job.watch)
        for output in made:
            job.add(output)

    def _together(self, jobs: list[Job]) -> None:
        """Makes `jobs` in one batch and ends each. If one job is cancelled, the others go on."""

        def watch(job: Job, progress: Progress) -> None:
            if not job.done:
                try:
                    job.watch(progress)
                except Ended:
                    job.end()
                except Refused as refused:
                    job.end(refused)
            if all(job.done for job in jobs):
                raise Ended

        made = self.generator.together([job.request for job in jobs], [partial(watch, job) for job in jobs])
        for job, output in zip(jobs, made, strict=True):
            if not job.done:
                job.add(output)
                job.end()

    def _refused(self, make: Callable[[list[Job]], None], jobs: list[Job]) -> Refused | None:
        """Calls `make(jobs)`. Returns the reason if it fails, else None."""
        try:
            make(jobs)
        except Ended:
            pass
        except Refused as refused:
            return refused
        except UsageError as error:
            return Refused(400, str(error))
        except Exception as error:
            log.exception("a job has failed")
            return Refused(500, f"{type(error).__name__}: a fault of jaxspd; the server's log says more")
        return None
