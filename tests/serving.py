"""A server in this process, for tests."""

from contextlib import contextmanager
from threading import Event, Thread
from time import sleep

import uvicorn

from jaxspd.server.app import make_app
from jaxspd.server.limits import Limits
from jaxspd.server.run import bound, configured


class Served:
    """A running server: its `app`, its `engine`, and its `url`."""

    def __init__(self, app, url):
        self.app, self.engine, self.url = app, app.state.service.engine, url


@contextmanager
def serving(generator, name="tiny", api_key=None, **limits):
    """Serves `generator` meanwhile."""
    app = make_app(generator, name, Limits.of(generator.family, **limits), api_key)
    listening = bound("127.0.0.1", 0)
    server = uvicorn.Server(configured(app))
    thread = Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            sleep(0.01)
        yield Served(app, f"http://127.0.0.1:{listening.getsockname()[1]}")
    finally:
        app.state.service.engine.stop(now=True)
        server.should_exit = True
        thread.join()
        app.state.service.engine.join(60)


class Held:
    """`generator`, which after the first step of each output waits until it is to `go`."""

    def __init__(self, generator):
        self._generator, self.family = generator, generator.family
        self.reached, self.go = Event(), Event()

    def iterate(self, params, *, watch, **options):
        def held(progress):
            self.reached.set()
            assert self.go.wait(60)
            watch(progress)

        return self._generator.iterate(params, watch=held, **options)
