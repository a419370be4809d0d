"""Runs a server in this process for tests, and sends it requests."""

import io
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import httpx2 as httpx
import jax
import numpy as np
import openai
import uvicorn
from PIL import Image

from jaxspd.server.app import make_app
from jaxspd.server.limits import Limits
from jaxspd.server.run import bound, configured

# A request that takes almost no time.
SMALL = {"num_inference_steps": 4, "seed": 5}
GENERATIONS = "/v1/images/generations"


class Served:
    """A running server: its `app`, its `engine`, and its `url`."""

    def __init__(self, app, url):
        self.app, self.engine, self.url = app, app.state.service.engine, url

    def openai(self, api_key="none"):
        """OpenAI's client for this server."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0)

    def get(self, path):
        return httpx.get(self.url + path)

    def post(self, body, path=GENERATIONS, timeout=60, **headers):
        return httpx.post(self.url + path, json=body, timeout=timeout, headers=headers)


@contextmanager
def serving(generator, name="tiny", api_key=None, hosts=(), **limits):
    """Serves `generator` while the context is open."""
    app = make_app(generator, name, Limits.of(generator.family, **limits), api_key, hosts=hosts)
    listening = bound("127.0.0.1", 0)
    server = uvicorn.Server(configured(app))
    thread = Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield Served(app, f"http://127.0.0.1:{listening.getsockname()[1]}")
    finally:
        app.state.service.engine.stop(now=True)
        server.should_exit = True
        thread.join()
        app.state.service.engine.join(60)


@contextmanager
def serving_process(folder, *flags, **environment):
    """Runs `jaxspd serve` in a process of its own, which knows the toy family, while the context is open.

    Yields the process, its `url`, and the lines that it printed before it was ready.
    """
    start = "from tests import toy; toy.register(); from jaxspd.cli import main; raise SystemExit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", start, "serve", f"--model-path={folder}", "--port=0", *flags],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **environment,
        },
    )
    try:
        lines = []
        while not lines or not lines[-1].startswith("ready: "):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        yield process, lines[-1].split()[-1], lines
    finally:
        process.kill()


class Held:
    """`generator`, which waits after the first step of each output, or batch, until `go` is set."""

    def __init__(self, generator):
        self._generator, self.family = generator, generator.family
        self.ready_together = generator.ready_together
        self.reached, self.go = Event(), Event()

    def _held(self, watch):
        def held(progress):
            self.reached.set()
            assert self.go.wait(60)
            watch(progress)

        return held

    def iterate(self, params, *, watch, **options):
        return self._generator.iterate(params, watch=self._held(watch), **options)

    def together(self, requests, watches):
        return self._generator.together(requests, [self._held(watch) for watch in watches])


def pixels(content):
    """The pixels of a file's bytes."""
    return np.asarray(Image.open(io.BytesIO(content)))


def wait_until(true):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
