"""Checks and logs every request: its host, its origin, the key, slow readers, counts, and a line of log. Does
not import jax.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Collection
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response

from jaxspd.server.limits import Refused
from jaxspd.server.metrics import Metrics

log = logging.getLogger("jaxspd.server")
# Seconds within which a client must accept the next part of an answer.
MOST_SECONDS = 60
# The page loads everything from this server, and no other page may frame it.
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def error_body(refused: Refused) -> dict[str, Any]:
    """The error in the form that OpenAI's clients read."""
    kind = "invalid_request_error" if refused.status < 500 else "server_error"
    return {"message": str(refused), "type": kind, "param": None, "code": refused.code}


def refusal(scope, refused: Refused) -> Response:
    """The answer to a request that is refused."""
    scope["reason"] = str(refused)
    headers = {"retry-after": str(refused.retry)} if refused.retry else {}
    if refused.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse({"error": error_body(refused)}, refused.status, headers)


def is_loopback(address: str) -> bool:
    """Whether `address`, a host's name or IP address, can be reached only from its own machine."""
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


class Gate:
    """The ASGI application `app`, behind these checks. With `hosts`, requests are refused unless they are for
    one of these or for this machine's own names.
    """

    def __init__(self, app, metrics: Metrics, api_key: str | None = None, hosts: Collection[str] = ()):
        self.app, self._metrics, self._key, self._hosts = app, metrics, api_key, hosts

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
            refused = self._refused(scope)
            app = refusal(scope, refused) if refused else self.app
            await app(scope, receive, sending)
        except TimeoutError:  # uvicorn closes the connection when an application fails midway
            scope["reason"] = "the client read too slowly"
            raise ConnectionError(scope["reason"]) from None
        finally:
            self._note(scope, status, time.monotonic() - begin)

    def _refused(self, scope) -> Refused | None:
        """The reason why a request may not pass, None if it may."""
        headers = Headers(scope=scope)
        host = _host(headers.get("host", ""))
        # DNS rebinding: a foreign page's name may now resolve to this machine, and then a browser treats the
        # two as one origin.
        if self._hosts and host and host not in self._hosts and not is_loopback(host):
            known = ", ".join(sorted({*self._hosts, "localhost"}))
            return Refused(
                421, f"this server is {known}, not {host}; start it with --api-key to use any name"
            )
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and _foreign(headers):
            return Refused(403, "pages of other origins may not use this server; use its own page")
        if self._wants_key(scope) and not self._has_key(headers):
            return Refused(401, "this server wants its --api-key as a bearer token", code="invalid_api_key")
        return None

    def _wants_key(self, scope) -> bool:
        path = scope["path"]
        return self._key is not None and (path.startswith("/v1/") or path == "/metrics")

    def _has_key(self, headers: Headers) -> bool:
        given = headers.get("authorization", "")
        return hmac.compare_digest(given.encode(), f"Bearer {self._key}".encode())

    def _note(self, scope, status: int, seconds: float) -> None:
        endpoint = getattr(scope.get("endpoint"), "__name__", "page" if "endpoint" in scope else "none")
        self._metrics.requests.labels(endpoint, status).inc()
        self._metrics.seconds.labels(endpoint).observe(seconds)
        client, *_ = scope.get("client") or ("-",)
        said = " · ".join(str(scope[key]) for key in ("about", "reason") if scope.get(key))
        # Everything is on one line, even if a path or a reason contains line breaks.
        line = " ".join(
            f"{client} {scope['method']} {scope['path']} {status} {seconds:.3f} s · {said}".split()
        )
        log.info("%s", line.rstrip(" ·"))


def _host(address: str) -> str:
    """The host in a Host header, without port and brackets."""
    try:
        return urlsplit(f"//{address}").hostname or ""
    except ValueError:
        return address


def _foreign(headers: Headers) -> bool:
    """Whether a page of another origin sent the request. Only browsers say so."""
    if site := headers.get("sec-fetch-site"):
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2] != headers.get("host")
