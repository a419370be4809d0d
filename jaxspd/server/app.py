"""The application: its routes, who may use them, and a line of log per request."""

from collections.abc import Collection
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from jaxspd.errors import UsageError
from jaxspd.generator import DiffGenerator
from jaxspd.server import images, videos
from jaxspd.server.gate import Gate, refusal
from jaxspd.server.limits import Limits, Refused
from jaxspd.server.metrics import CONTENT_TYPE
from jaxspd.server.service import Service
from jaxspd.server.videos import Videos

PAGE = Path(__file__).parent / "page"


def make_app(
    generator: DiffGenerator,
    name: str,
    limits: Limits | None = None,
    api_key: str | None = None,
    prefix: str = "",
    hosts: Collection[str] = (),
) -> Starlette:
    """The ASGI application that serves `generator` as the model `name`.

    With `api_key`, all paths but the page and `/health` require it as a bearer token. Names of stored outputs
    begin with `prefix`. With `hosts`, the application answers only to these and to the names of this machine.
    `app.state.service.engine.stop()` ends it gracefully.
    """
    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/v1/models", models),
            Route("/v1/models/{id:path}", model),
            Route("/v1/images/generations", images.generations, methods=["POST"]),
            Route("/images/{name}", images.stored, name="stored"),
            Route("/v1/videos", videos.listing),
            Route("/v1/videos", videos.create, methods=["POST"]),
            Route("/v1/videos/{id}", videos.retrieve),
            Route("/v1/videos/{id}", videos.delete, methods=["DELETE"]),
            Route("/v1/videos/{id}/content", videos.content),
            Route("/", page),
            Mount("/page", StaticFiles(directory=PAGE)),
        ],
        exception_handlers=dict.fromkeys((Refused, UsageError, HTTPException, Exception), failed),
    )
    app.state.service = Service(generator, name, limits or Limits.of(generator.family), prefix)
    app.state.videos = Videos(app.state.service)
    app.add_middleware(Gate, api_key=api_key, metrics=app.state.service.metrics, hosts=hosts)
    return app


async def failed(http: HttpRequest, error: Exception) -> Response:
    """The answer that reports `error`."""
    headers = getattr(error, "headers", None) or {}
    if isinstance(error, UsageError):
        error = Refused(400, str(error))
    elif isinstance(error, HTTPException):  # raised by Starlette
        error = Refused(error.status_code, f"{http.method} {http.url.path}: {error.detail}")
    elif not isinstance(error, Refused):
        error = Refused(500, f"{type(error).__name__}: a fault of jaxspd; the server's log says more")
    answer = refusal(http.scope, error)
    answer.headers.update(headers)
    return answer


async def page(http: HttpRequest) -> Response:
    """`GET /`: the page."""
    return FileResponse(PAGE / "index.html")


async def health(http: HttpRequest) -> Response:
    """`GET /health`: 200 while jobs are taken, 503 when the server is stopping."""
    engine = http.app.state.service.engine
    status = "stopping" if engine.stopping else "ok"
    return JSONResponse({"status": status, "waiting": engine.waiting}, 503 if engine.stopping else 200)


async def metrics(http: HttpRequest) -> Response:
    """`GET /metrics`: the counts for Prometheus."""
    service: Service = http.app.state.service
    service.metrics.waiting.set(service.engine.waiting)
    service.metrics.stored.set(service.store.size)
    return Response(service.metrics.text(), media_type=CONTENT_TYPE)


async def models(http: HttpRequest) -> Response:
    """`GET /v1/models`: the list with the one model."""
    return JSONResponse({"object": "list", "data": [http.app.state.service.model()]})


async def model(http: HttpRequest) -> Response:
    """`GET /v1/models/{id}`: the model, if it has that name."""
    service: Service = http.app.state.service
    service.check_model(http.path_params["id"])
    return JSONResponse(service.model())
