"""`POST /v1/images/generations`, in the form of OpenAI's API."""

import asyncio
import base64
import json
import time
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from jaxspd.request import Request
from jaxspd.results import Output
from jaxspd.server.bodies import Ask, image_ask, read_body
from jaxspd.server.engine import Job, Look
from jaxspd.server.files import encoded, png, public
from jaxspd.server.gate import error_body
from jaxspd.server.limits import Refused
from jaxspd.server.service import Service


async def generations(http: HttpRequest) -> Response:
    """Makes pictures of one prompt. The answer holds the pictures or their addresses, or is a stream of
    events.
    """
    service: Service = http.app.state.service
    ask = image_ask(await read_body(http))
    request = service.resolve(ask, picture=True)
    http.scope["about"] = about(request)
    if ask.stream:
        return Events(service, http, ask, request)
    async with service.submitted(http, request) as (job, change):
        while await change():
            pass
        raise_for(job)
        data = [await _answer(service, http, ask, output) for output in job.outputs]
    return JSONResponse(
        {
            "created": int(time.time()),
            "data": data,
            "background": "opaque",
            "output_format": "png",
            "size": f"{request.width}x{request.height}",
            "seconds": job.seconds_made,
            "together": job.together,
        }
    )


def about(request: Request) -> str:
    """The request as the log shows it, without prompts."""
    frames = f" {request.num_frames} frames" if request.num_frames > 1 else ""
    return (
        f"{request.num_outputs_per_prompt} of {request.width}×{request.height}{frames} "
        f"steps {request.num_inference_steps} {request.progressive_mode} seed {request.seed}"
    )


def raise_for(job: Job) -> None:
    """Raises Refused unless all of `job` is made."""
    if job.refused:
        raise job.refused
    if not job.done or job.cancelled:
        raise Refused(499, "the client went away")


async def _answer(service: Service, http: HttpRequest, ask: Ask, output: Output) -> dict[str, Any]:
    """One picture, with the parameters that repeat it."""
    file, _ = await asyncio.to_thread(encoded, output)
    about = {"seed": output.request["seed"], "request": public(output.request), "seconds": output.seconds}
    if not ask.url:
        return {"b64_json": base64.b64encode(file.content).decode(), **about}
    return {"url": str(http.url_for("stored", name=f"{service.store.put(file)}.png")), **about}


async def stored(http: HttpRequest) -> Response:
    """`GET /images/{name}`: a picture whose address was given. No API key is needed, since the name is
    secret.
    """
    name = http.path_params["name"].removesuffix(".png")
    file = http.app.state.service.store.get(name)
    if file is None:
        raise Refused(404, "there is no such picture, or no longer")
    headers = {"cache-control": "private, max-age=31536000, immutable"}
    return Response(file.content, media_type=file.media_type, headers=headers)


class Events(Response):
    """Server-sent events: `image_generation.partial_image` and `image_generation.completed`, in the form of
    OpenAI's API, and `error`.
    """

    def __init__(self, service: Service, http: HttpRequest, ask: Ask, request: Request):
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._service, self._http, self._ask, self._request = service, http, ask, request

    async def __call__(self, scope, receive, send) -> None:
        looks, sent = self._ask.partial_images, 0
        async with self._service.submitted(self._http, self._request, looks) as (job, change):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            more = True
            while more:
                more = await change()
                # Sends what is new. Outputs are read before looks, because an output's looks come before it.
                outputs, text = job.outputs[sent:], ""
                while job.looks:
                    text += self._partial(job.looks.popleft())
                for output in outputs:
                    text += await self._completed(output, sent)
                    sent += 1
                await send(_chunk(text or ": waiting\n\n"))
            end = _event({"type": "error", "error": error_body(job.refused)}) if job.refused else ""
            await send(_chunk(end, more=False))

    def _common(self, kind: str) -> dict[str, Any]:
        size = f"{self._request.width}x{self._request.height}"
        common = {"created_at": int(time.time()), "output_format": "png", "size": size}
        return {"type": kind, **common, "quality": "auto", "background": "opaque"}

    def _partial(self, look: Look) -> str:
        return _event(
            self._common("image_generation.partial_image")
            | {"partial_image_index": look.index, **described(look)},
        )

    async def _completed(self, output: Output, number: int) -> str:
        answer = await _answer(self._service, self._http, self._ask, output)
        return _event(self._common("image_generation.completed") | {"output": number} | answer)


def described(look: Look) -> dict[str, Any]:
    """A look in the form that clients read."""
    values = {name: value for name, value in vars(look).items() if name not in ("pixels", "index")}
    picture = base64.b64encode(png(look.pixels)).decode()
    return {"b64_json": picture, "grid": [*look.pixels.shape[:2]], **values}


def _chunk(text: str, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


def _event(values: dict[str, Any]) -> str:
    return f"event: {values['type']}\ndata: {json.dumps(values)}\n\n"
