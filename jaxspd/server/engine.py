"""One queue, and one thread that holds the generator."""

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
    """A job is to be made no further."""


@dataclass(frozen=True)
class Look:
    """What an output was heading for after a step: `pixels` `[h, w, 3]`, uint8, of a video's middle frame;
    the numbers, from 0, of the look, of the output, of the `stage` and of the `step`; how many `stages` and
    `steps` there are, and the noise level reached.
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
    """A request on its way, of which nothing more is made after so many `seconds`. `changed` is called, in
    the engine's thread, whenever there is news: one more of `looks`, one more of `outputs`, or the end, which
    is `done`; `refused` says why it is not a good one.

    `count` is how many looks are taken at each output. Until somebody takes them out, the newest of each
    stage is kept. `together` is how many jobs were made at once.
    """

    def __init__(
        self, request: Request, seconds: float, count: int = 0, changed: Callable[[], None] = lambda: None
    ):
        self.request, self._count, self.changed = request, count, changed
        self.came, self.started, self.ended = time.monotonic(), None, None
        self.deadline, self.seconds = self.came + seconds, seconds
        self.looks: deque[Look] = deque()
        self._looked = 0
        self.outputs: list[Output] = []
        self.progress, self.refused, self.cancelled, self.done = 0.0, None, False, False
        self.together = 1

    def watch(self, progress: Progress) -> None:
        """Notes a step, as `DiffGenerator.iterate` tells of it."""
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

    def add(self, output: Output) -> None:
        self._looked = 0
        self.outputs.append(output)
        self.changed()

    def check(self) -> None:
        """Ended where nobody waits for it any more."""
        if self.cancelled:
            raise Ended
        if time.monotonic() > self.deadline:
            raise Refused(504, f"this took longer than {self.seconds:g} seconds; ask for less, or later")

    def end(self, refused: Refused | None = None) -> None:
        self.refused, self.done, self.ended = refused, True, time.monotonic()
        self.changed()


class Engine:
    """Makes jobs in the order in which they came; those of one shape together, where that is faster."""

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
        """Jobs that are not begun."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Puts `job` into the queue; Refused where that is full, or the server stops."""
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
        """Makes `job` no further: at once if it waits, else before its next step."""
        job.cancelled = True
        with self._news:
            if job in self._waiting:
                self._waiting.remove(job)
                job.end()

    def stop(self, now: bool = False) -> None:
        """Takes no more jobs, and hands back those that wait. Those that are being made go on, unless they
        are to end `now`.
        """
        with self._news:
            self.stopping = True
            waiting, self._waiting = [*self._waiting], deque()
            self._news.notify()
        for job in waiting:
            job.end(Refused(503, "the server is stopping; ask again", retry=5))
        for job in self.current if now else ():
            job.cancelled = True

    def check_alive(self) -> None:
        """RuntimeError where nothing is made any more, though nobody said stop."""
        if not self._thread.is_alive() and not self.stopping:
            raise RuntimeError("the engine's thread has ended")

    def join(self, seconds: float | None = None) -> None:
        """Waits until the last job after a `stop` is made."""
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
            del jobs, job, first, waiting  # else their outputs would lie in memory until the next one comes

    def _make(self, jobs: list[Job]) -> None:
        """Makes and ends `jobs`. Where several cannot be made together, each is made alone."""
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
        """Makes `jobs` in one batch, and ends each. Who gives up leaves the others to it."""

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
        """Makes `jobs`; returns what kept them from being made, if anything did."""
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
