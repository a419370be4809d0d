"""Requests of equal shape, made together."""

import base64
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest

from jaxspd import SamplingParams, UsageError
from jaxspd.resolving import resolve
from jaxspd.server.batches import Batches
from jaxspd.server.engine import Engine, Job
from jaxspd.server.limits import Limits
from tests.serving import Held, pixels, serving, wait_until

GROW = {"progressive_mode": "dct_rewind", "progressive_sigmas": [0.6], "num_inference_steps": 6}
ASKS = [
    {"prompt": "a lake", "seed": 1, "negative_prompt": "haze", **GROW},
    {"prompt": "a meadow at noon", "seed": 7, **GROW},
    {"prompt": "a lake", "seed": 2, "negative_prompt": "", **GROW},
    {"prompt": "snow", "seed": 1, **GROW},
]
OTHER = {"prompt": "a lake", "num_inference_steps": 1}


@pytest.fixture
def request_of(toy_generator):
    return lambda ask: resolve(toy_generator.family, SamplingParams.from_mapping(ask))


@pytest.fixture
def worthwhile(toy_generator, request_of, monkeypatch):
    """Batches count as faster untried, and of four, all is compiled."""
    monkeypatch.setattr(
        Batches, "_worth", lambda self, request, _, n: self._generator.ready_together(request, n)
    )
    wait_until(lambda: toy_generator.ready_together(request_of(ASKS[0]), 4))


@pytest.fixture
def engine(toy_generator, worthwhile):
    """One whose generator is held at the first steps, and at work on something else already."""
    held = Held(toy_generator)
    engine = Engine(held, Limits.of(toy_generator.family))
    first = Job(resolve(toy_generator.family, SamplingParams.from_mapping(OTHER)), 60)
    engine.submit(first)
    assert held.reached.wait(60)
    yield engine, held
    engine.stop(now=True)
    held.go.set()
    engine.join(60)


def begin(engine, held, jobs):
    """Submits `jobs`, which reach their first step and wait there."""
    for job in jobs:
        engine.submit(job)
    held.reached.clear()
    held.go.set()
    held.go = Event()
    assert held.reached.wait(60)
    assert engine.current == jobs


def alone(generator, ask):
    """The picture of `ask`, and its preview after each step."""
    looks = []
    options = {"save_output": False, "show_progress": False}
    [output] = generator.iterate(ask, watch=lambda progress: looks.append(progress.preview()[0]), **options)
    return output.frames[0], looks


def assert_near(one, other):
    """Within one grey level."""
    assert one.shape == other.shape
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


def test_each_gets_its_own_picture_looks_and_parameters(toy_generator, worthwhile):
    held = Held(toy_generator)
    with serving(held) as served, ThreadPoolExecutor(6) as pool, served.openai() as client:

        def ask(body):
            events = client.images.generate(
                prompt=body["prompt"], stream=True, partial_images=6, extra_body=body
            )
            *looks, last = events
            return looks, last

        first = pool.submit(served.post, OTHER)
        assert held.reached.wait(60)
        *streams, plain = [pool.submit(ask, body) for body in ASKS[:3]] + [pool.submit(served.post, ASKS[3])]
        other = pool.submit(served.post, OTHER)
        wait_until(lambda: served.engine.waiting == 5)
        held.go.set()
        assert [first.result().json()["together"], other.result().json()["together"]] == [1, 1]
        answer = plain.result().json()
        assert answer["together"] == 4
        made = [(answer["data"][0], [])]
        for stream in streams:
            looks, last = stream.result()
            made.append((last.model_dump(), looks))
        assert "jaxspd_jobs_together_total 4.0" in served.get("/metrics").text
    for body, (picture, looks) in zip([ASKS[3], *ASKS[:3]], made, strict=True):
        frames, steps = alone(toy_generator, body)
        assert_near(pixels(base64.b64decode(picture["b64_json"])), frames)
        assert picture["request"].items() >= body.items()
        assert picture["seed"] == body["seed"]
        for look in looks:
            assert_near(pixels(base64.b64decode(look.b64_json)), steps[look.step])
    assert sum(len(looks) for _, looks in made) >= 3 * 2


def test_who_goes_away_or_takes_too_long_leaves_the_others(engine, toy_generator, request_of):
    engine, held = engine
    jobs = [Job(request_of(ask), seconds) for ask, seconds in zip(ASKS, (60, 60, 0.5, 60), strict=True)]
    begin(engine, held, jobs)
    engine.cancel(jobs[1])
    time.sleep(0.5)
    held.go.set()
    wait_until(lambda: all(job.done for job in jobs))
    assert [len(job.outputs) for job in jobs] == [1, 0, 0, 1]
    assert "took longer than 0.5 seconds" in str(jobs[2].refused)
    for number in (0, 3):
        assert_near(jobs[number].outputs[0].frames[0], alone(toy_generator, ASKS[number])[0])


def test_a_batch_that_all_have_left_is_given_up(engine, request_of):
    engine, held = engine
    long = {**ASKS[0], "num_inference_steps": 6}
    jobs = [Job(request_of({**long, "seed": seed}), 60) for seed in range(4)]
    begin(engine, held, jobs)
    for job in jobs:
        engine.cancel(job)
    held.go.set()
    wait_until(lambda: not engine.current)
    assert not any(job.outputs or job.refused for job in jobs)
    assert max(job.progress for job in jobs) == 0


def test_what_cannot_be_made_together_is_made_alone(engine, toy_generator, request_of, monkeypatch):
    engine, held = engine

    def together(requests, watches):
        raise UsageError("no memory")

    monkeypatch.setattr(held, "together", together)
    jobs = [Job(request_of(ask), 60) for ask in ASKS]
    for job in jobs:
        engine.submit(job)
    held.go.set()
    wait_until(lambda: all(job.done for job in jobs))
    for job, ask in zip(jobs, ASKS, strict=True):
        assert job.together == 1
        np.testing.assert_array_equal(job.outputs[0].frames[0], alone(toy_generator, ask)[0])


class Ready:
    """A generator that compiles so many at once."""

    def __init__(self, *sizes):
        self.sizes, self.asked = sizes, []

    def ready_together(self, request, size):
        self.asked.append(size)
        if size == 4 and 4 not in self.sizes:
            raise UsageError("no memory for that")
        return size in self.sizes


def chosen(tried, request, waiting):
    """How many are made together, of so many that wait beside it."""
    return 1 + len(tried.choose(request, [request] * waiting))


def test_a_shape_is_made_together_where_that_has_proved_faster(request_of):
    request = request_of(ASKS[0])
    tried = Batches(Ready(2, 4), 4)
    for _ in range(3):
        assert chosen(tried, request, 5) == 1
        tried.note(request, 1, 10.0)
    # Both ways in turns, and the best tells.
    for seconds in (99.0, 31.0, 50.0):
        assert chosen(tried, request, 3) == 4
        tried.note(request, 4, seconds)
        if seconds != 50.0:
            assert chosen(tried, request, 3) == 1
            tried.note(request, 1, 10.0)
    for _ in range(3):
        tried.note(request, 2, 17.0)
    # 7.75 seconds each in fours, 8.5 in twos.
    assert [chosen(tried, request, waiting) for waiting in range(6)] == [1, 1, 1, 4, 4, 4]
    for _ in range(3):
        tried.note(request, 4, 33.0)
    assert chosen(tried, request, 3) == 1
    # After a hundred jobs all is tried anew.
    for _ in range(100):
        tried.note(request, 1, 10.0)
    assert chosen(tried, request, 3) in (1, 4)
    assert chosen(tried, request, 3) + chosen(tried, request, 3) == 5


def test_what_is_not_compiled_is_not_waited_for(request_of):
    request = request_of(ASKS[0])
    tried = Batches(ready := Ready(2), 4)
    for _ in range(3):
        tried.note(request, 1, 10.0)
    assert [chosen(tried, request, 3) for _ in range(3)] == [2, 1, 2]
    assert ready.asked == [4, 2, 2, 2]  # what cannot be is asked for once
    assert chosen(Batches(Ready(), 4), request, 1) == 1


def test_only_like_is_made_with_like(request_of):
    one = request_of(ASKS[0])
    tried = Batches(Ready(2, 4), 4)
    unlike = [{"num_inference_steps": 7}, {"guidance_scale": 3.0}, {"height": 64}, {"scheduler": "unipc"}]
    others = [request_of({**ASKS[1], **other}) for other in unlike]
    for _ in range(3):
        tried.note(one, 1, 10.0)
    assert tried.choose(one, [*others, request_of(ASKS[1])]) == [4]
    several = request_of({**ASKS[0], "num_outputs_per_prompt": 2})
    assert tried.choose(several, [several] * 3) == []
    assert Batches(Ready(2, 4), 1).choose(one, [one] * 3) == []
