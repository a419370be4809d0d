"""Many threads: the first use from several at once, one generator shared, and what has failed once."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest

from jaxspd import DiffGenerator, UsageError
from jaxspd.sampling import programs
from jaxspd.sampling.programs import Programs
from jaxspd.sampling.solvers import SOLVERS
from jaxspd.spectral.levels import halvings
from jaxspd.spectral.spectrum import Spectrum
from tests.plans import plan_of

THREADS = 6
FIRST_USE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
start = Barrier(3)

def picture(seed):
    start.wait()
    from jaxspd import DiffGenerator
    generator = DiffGenerator.from_pretrained(sys.argv[1], compilation_cache=False)
    request = {"prompt": "a lake", "height": 32, "width": 32, "num_inference_steps": 1, "seed": seed}
    return generator.generate(request, save_output=False, show_progress=False).frames[0].shape

with ThreadPoolExecutor(3) as pool:
    print(set(pool.map(picture, range(3))))
"""


def test_the_first_use_may_come_from_several_threads_at_once(flux1_folder):
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USE, str(flux1_folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "{(1, 32, 32, 3)}"


def test_threads_that_share_a_generator_get_their_own_pictures(flux1_folder):
    def picture(generator, number):
        # Two sizes, so that compiling one goes on while the other is asked for.
        request = {"prompt": f"lake {number}", "height": 32, "width": 32 << number % 2, "seed": number}
        request |= {"num_inference_steps": 2}
        result = generator.generate(request, save_output=False, show_progress=False)
        return result.frames[0]

    def together(number):
        start.wait()
        return picture(shared, number)

    alone = DiffGenerator.from_pretrained(str(flux1_folder), compilation_cache=False)
    wanted = [picture(alone, number) for number in range(THREADS)]
    shared, start = (
        DiffGenerator.from_pretrained(str(flux1_folder), compilation_cache=False),
        Barrier(THREADS),
    )
    with ThreadPoolExecutor(THREADS) as pool:
        for frames, expected in zip(pool.map(together, range(THREADS)), wanted, strict=True):
            np.testing.assert_array_equal(frames, expected)
    [both] = shared._denoiser._programs.values()
    assert both.compiled_steps == 2


def test_what_failed_to_compile_is_compiled_when_next_asked_for(monkeypatch):
    plan = plan_of(
        halvings((4, 6), 0), [1.0, 0.0], Spectrum(1.0, 1.0), mode="fullres", delta=0.1, tokens=lambda grid: 1
    )
    made = Programs(lambda p, latents, sigma, conditioning: p * latents, SOLVERS["euler"])
    arguments = plan, (1, 2), np.float32(1), np.float32(0)
    with monkeypatch.context() as patched:
        patched.setattr(programs, "Layerwise", lambda *_, **__: 1 / 0)
        failed = made.prepare(*arguments)
        with pytest.raises(ZeroDivisionError):
            made.wait(failed)
    made.wait(made.prepare(*arguments))
    assert made.compiled_steps == 2
    made.prepare(*arguments)
    assert made.compiled_steps == 2


def test_a_failure_of_another_size_is_no_failure_of_this_one(monkeypatch):
    made = Programs(lambda p, latents, sigma, conditioning: p * latents, SOLVERS["euler"])

    def prepare(grid):
        plan = plan_of(
            halvings(grid, 0), [1.0, 0.0], Spectrum(1.0, 1.0), mode="fullres", delta=0.1, tokens=lambda g: 1
        )
        return made.prepare(plan, (1, 2), np.float32(1), np.float32(0))

    with monkeypatch.context() as patched:
        patched.setattr(programs, "Layerwise", lambda *_, **__: 1 / 0)
        [failed] = prepare((8, 8))
        assert isinstance(failed.exception(), ZeroDivisionError)
    assert made.wait(prepare((4, 4))) >= 0


def test_a_load_that_failed_is_tried_again(flux1_folder, monkeypatch):
    request = {"prompt": "a lake", "height": 32, "width": 32, "num_inference_steps": 1}
    from jaxspd.components import transformer as module

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(module, "load_transformer", fail)
        generator = DiffGenerator.from_pretrained(str(flux1_folder), compilation_cache=False)
        with pytest.raises(UsageError, match="memory"):
            generator.generate(request, save_output=False, show_progress=False)
    result = generator.generate(request, save_output=False, show_progress=False)
    assert result.frames[0].shape == (1, 32, 32, 3)


def test_programs_of_the_last_shapes_are_kept(monkeypatch):
    monkeypatch.setattr(programs, "RECENT", 2)
    made = Programs(lambda p, latents, sigma, conditioning: p * latents, SOLVERS["euler"])

    def prepare(width):
        plan = plan_of(
            halvings((4, width), 0),
            [1.0, 0.0],
            Spectrum(1.0, 1.0),
            mode="fullres",
            delta=0.1,
            tokens=lambda g: 1,
        )
        return made.prepare(plan, (1, 2), np.float32(1), np.float32(0))

    held = prepare(2)
    made.wait(held)
    for width in (4, 6, 4, 8, 4):
        made.wait(prepare(width))
    # What somebody works with stays too; 6 was pushed out by 8.
    assert made.compiled_steps == 4
    assert len(made._programs) == 3
    prepare(2), prepare(4)
    assert made.compiled_steps == 4
    made.wait(prepare(6))
    assert made.compiled_steps == 5
