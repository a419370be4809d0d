"""What every request passes: the key, a limit to slow readers, counts, and one line of log. Does not import
jax.
"""

import asyncio
import hmac
import logging
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response

from jaxspd.server.limits import Refused
from jaxspd.server.metrics import Metrics

log = logging.getLogger("jaxspd.server")
# Seconds that a client may take to make room for the next piece of an answer.
MOST_SECONDS = 60
# The page has all it needs from here; nobody may frame it.
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def error_body(refused: Refused) -> dict[str, Any]:
    """The error as OpenAI's clients read it."""
    kind = "invalid_request_error" if refused.status < 500 else "server_error"
    return {"message": str(refused), "type": kind, "param": None, "code": refused.code}


def refusal(scope, refused: Refused) -> Response:
    """The answer that says no, and why."""
    scope["reason"] = str(refused)
    headers = {"retry-after": str(refused.retry)} if refused.retry else {}
    if refused.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse({"error": error_body(refused)}, refused.status, headers)


class Gate:
    """The ASGI application `app`, behind all this."""

    def __init__(self, app, metrics: Metrics, api_key: str | None = None):
        self.app, self._metrics, self._key = app, metrics, api_key

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.monotonic(), 500

        async def sending(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(HEADERS)
            async with asyncio.timeout(MOST_SECONDS):
                await send(message)

        try:
            if self._wants_key(scope) and not self._has_key(scope):
                refused = Refused(
                    401, "this server wants its --api-key as a bearer token", code="invalid_api_key"
                )
                await refusal(scope, refused)(scope, receive, sending)
            else:
                await self.app(scope, receive, sending)
        except TimeoutError:  # uvicorn closes the connection when an application fails midway
            scope["reason"] = "the client read too slowly"
            raise ConnectionError(scope["reason"]) from None
        finally:
            self._note(scope, status, time.monotonic() - begin)

    def _wants_key(self, scope) -> bool:
        path = scope["path"]
        return self._key is not None and (path.startswith("/v1/") or path == "/metrics")

    def _has_key(self, scope) -> bool:
        given = Headers(scope=scope).get("authorization", "")
        return hmac.compare_digest(given.encode(), f"Bearer {self._key}".encode())

    def _note(self, scope, status: int, seconds: float) -> None:
        endpoint = getattr(scope.get("endpoint"), "__name__", "page" if "endpoint" in scope else "none")
        self._metrics.requests.labels(endpoint, status).inc()
        self._metrics.seconds.labels(endpoint).observe(seconds)
        client, *_ = scope.get("client") or ("-",)
        said = " · ".join(str(scope[key]) for key in ("about", "reason") if scope.get(key))
        # On one line, whatever a path or a reason holds.
        line = " ".join(
            f"{client} {scope['method']} {scope['path']} {status} {seconds:.3f} s · {said}".split()
        )
        log.info("%s", line.rstrip(" ·"))
