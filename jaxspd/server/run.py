"""Runs a server in this process, from opening the model to the end of its last job."""

import logging
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette

from jaxspd.errors import UsageError
from jaxspd.generator import DiffGenerator
from jaxspd.server.app import make_app
from jaxspd.server.gate import is_loopback
from jaxspd.server.limits import Limits

# Largest number of connections; others get status 503.
CONNECTIONS = 1000
# Longest duration of a graceful stop in seconds. After that, connections are closed.
GRACE = 300


class Server(uvicorn.Server):
    """Prints `ready` when the server is ready. The first signal refuses all waiting jobs; a second one ends
    the running job too.
    """

    def __init__(self, config: uvicorn.Config, ready: str):
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        print(self._ready, file=sys.stderr, flush=True)

    def handle_exit(self, sig, frame) -> None:
        app: Any = self.config.app
        again, state = self.should_exit, app.state
        super().handle_exit(sig, frame)
        state.service.engine.stop(now=again)
        state.videos.stop()


def serve(
    model: dict[str, Any], host: str, port: int, api_key: str | None, limits: dict[str, int | None]
) -> None:
    """Serves until SIGINT or SIGTERM. `model` holds the arguments of `DiffGenerator.from_pretrained`. Raises
    UsageError if the model cannot be opened or the address cannot be used.
    """
    listening = bound(host, port)
    log = logging.getLogger("jaxspd.server")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
    logging.getLogger("python_multipart").setLevel(
        logging.ERROR
    )  # clients are told what is wrong with a form
    generator = DiffGenerator.from_pretrained(**model)
    name = model_name(model.get("model_path"))
    warm_up(generator)
    address, port, *_ = listening.getsockname()
    # With a key no check of hosts is needed, since a foreign page does not have the key.
    hosts = {host.lower()} if is_loopback(address) and api_key is None else ()
    app = make_app(generator, name, Limits.of(generator.family, **limits), api_key, hosts=hosts)
    shown = f"[{host}]" if ":" in host else host
    ready = f"ready: {name} at http://{shown}:{port}"
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal again
        Server(configured(app), ready).run([listening])
    engine = app.state.service.engine
    engine.stop(now=True)
    engine.join()


def configured(app: Starlette) -> uvicorn.Config:
    """The configuration with which uvicorn runs `app`. uvicorn writes no logs, and stops within `GRACE`
    seconds.
    """
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=GRACE,
    )


def bound(host: str, port: int) -> socket.socket:
    """A socket at the address. Nobody can connect to it yet. Raises UsageError if the address cannot be
    used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"cannot listen at {host}, port {port} ({reason}); use another host or port"
        ) from None
    return listening


def model_name(path: str | os.PathLike | None) -> str:
    """The model's name for clients: its hub id, its folder's name, or `demo`."""
    if path is None:
        return "demo"
    return Path(path).absolute().name if os.path.isdir(path) else str(path)


def warm_up(generator: DiffGenerator) -> None:
    """Reads all weights and compiles the programs for the model's default size, with and without growth, with
    its own solver and with that of the speed settings. For this it makes outputs in few steps, of which the
    first is coarse.
    """
    few = {"prompt": "a lake", "num_inference_steps": 4, "progressive_sigmas": [0.999]}
    for how in ({"progressive_mode": "dct_rewind", "progressive_respace": True}, {"speed": "fast"}):
        for _ in generator.iterate(
            {**few, **how},
            save_output=False,
            show_progress=False,
            watch=lambda progress: progress.preview(),
        ):
            pass
