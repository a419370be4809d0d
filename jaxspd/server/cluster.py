"""The same application on many devices, by Ray Serve.

    serve run jaxspd.server.cluster:application model_path=black-forest-labs/FLUX.1-dev devices=4 gpus=1

Each device has a deployment with a model. A router in front sends each request to the least busy device, and
to another one if that device dies before it has answered.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from jaxspd.errors import UsageError

# The parts of a request that are sent to a model.
SCOPE = (
    "type",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
    "client",
    "server",
)
# Names of stored outputs begin with the number of the device that holds them.
KEPT = re.compile(r"/(?:images/|v1/videos/video_)(\d+)-")


@serve.deployment(max_ongoing_requests=1000, graceful_shutdown_timeout_s=300)
class Model:
    """Device number `number`, with a model. `model` holds the arguments of
    `DiffGenerator.from_pretrained`.
    """

    def __init__(self, number: int, model: dict[str, Any], api_key: str | None):
        from jaxspd.generator import DiffGenerator
        from jaxspd.server.app import make_app
        from jaxspd.server.run import model_name, warm_up

        generator = DiffGenerator.from_pretrained(**model)
        warm_up(generator)
        name = model_name(model.get("model_path"))
        self._app = make_app(generator, name, api_key=api_key, prefix=f"{number}-")

    async def __call__(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[dict[str, Any]]:
        """Yields the application's messages in answer to one request."""
        messages: asyncio.Queue[Any] = asyncio.Queue()  # None ends them
        gone = asyncio.Event()
        coming = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            for message in coming:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        task = asyncio.ensure_future(self._app(scope, receive, messages.put))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            gone.set()

    def check_health(self) -> None:
        """Raises RuntimeError if the engine has died. Then Ray restarts this replica."""
        self._app.state.service.engine.check_alive()


@serve.deployment(max_ongoing_requests=10_000, num_replicas=1)
class Router:
    """Receives clients' requests and forwards them to `models`."""

    def __init__(self, *models: DeploymentHandle):
        self._models = [model.options(stream=True) for model in models]
        self._busy = [0] * len(models)

    async def __call__(self, http: HttpRequest) -> Response:
        scope, body = {key: http.scope[key] for key in SCOPE if key in http.scope}, await http.body()
        if (kept := KEPT.match(http.url.path)) and int(kept[1]) < len(self._models):
            return await self._answer(int(kept[1]), scope, body)
        if (http.method, http.url.path) == ("GET", "/v1/videos"):
            return await self._listing(scope)
        tried: set[int] = set()
        while len(tried) < len(self._models):
            number = min({*range(len(self._models))} - tried, key=self._busy.__getitem__)
            tried.add(number)
            try:
                return await self._answer(number, scope, body)
            except (RayActorError, RayServeException):  # the model has died, and its outputs are lost
                continue
        error = {"message": "no device is available; ask again", "type": "server_error"}
        return JSONResponse({"error": error}, 503, {"retry-after": "5"})

    async def _answer(self, number: int, scope: dict[str, Any], body: bytes) -> Response:
        """The answer of model `number`. A stream of events is passed on from its first message; other answers
        are passed on whole.
        """
        messages = self._messages(number, scope, body)
        start = await anext(messages)
        response = Response(status_code=start["status"])
        response.raw_headers = [tuple(pair) for pair in start["headers"]]
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            events = StreamingResponse((message["body"] async for message in messages), response.status_code)
            events.raw_headers = response.raw_headers
            return events
        response.body = b"".join([message.get("body", b"") async for message in messages])
        return response

    async def _messages(self, number: int, scope: dict[str, Any], body: bytes) -> AsyncIterator[dict]:
        self._busy[number] += 1
        try:
            async for message in self._models[number].remote(scope, body):
                yield message
        finally:
            self._busy[number] -= 1

    async def _listing(self, scope: dict[str, Any]) -> Response:
        """The list of all models' videos, newest first."""
        answers = [await self._answer(number, scope, b"") for number in range(len(self._models))]
        for answer in answers:
            if answer.status_code != 200:
                return answer
        lists = [json.loads(bytes(answer.body)) for answer in answers]
        videos = sorted((one for some in lists for one in some["data"]), key=lambda one: -one["created_at"])
        ends = {"first_id": videos[0]["id"], "last_id": videos[-1]["id"]} if videos else {}
        return JSONResponse({"object": "list", "data": videos, "has_more": False, **ends})


def application(options: Mapping[str, str]) -> serve.Application:
    """The Ray Serve application for `options`.

    `devices` is the number of devices (by default 1), and `gpus` the number of GPUs that Ray reserves for
    each (by default 0). `api_key`, `model_path` and `revision` are as for `jaxspd serve`. Raises UsageError
    for other options.
    """
    known: dict[str, Any] = {
        "devices": "1",
        "gpus": "0",
        "api_key": None,
        "model_path": None,
        "revision": None,
    }
    if unknown := options.keys() - known:
        raise UsageError(f"unknown option {min(unknown)!r}; use {', '.join(known)}")
    given = known | dict(options)
    model = {name: given[name] for name in ("model_path", "revision") if given[name]}
    actor = {"num_gpus": float(given["gpus"])}
    return Router.bind(  # type: ignore[attr-defined]  # made by Ray's decorator
        *(
            Model.options(  # type: ignore[attr-defined]  # made by Ray's decorator
                name=f"model-{number}", ray_actor_options=actor
            ).bind(number, model, given["api_key"])
            for number in range(int(given["devices"]))
        )
    )
