"""What stands before the application: who may call, how much they may send, and how long they may take."""

import asyncio
import hmac
import ipaddress
import json
import time
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.serve.stats import ServiceStats

__all__ = ["Guard", "GuardSettings", "answer", "is_loopback"]

#: Open without a key: the page, which holds no data, and the health check of a load balancer.
_PUBLIC = ("/", "/health", "/page.css", "/page.js", "/icon.svg")
#: Of a request that needs none; otherwise anybody could fill the memory through the public addresses.
_SMALL_BODY_BYTES = 1 << 14
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        b"media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
)


@dataclass(frozen=True)
class GuardSettings:
    """Limits of one service."""

    access_key: str | None  #: None: no key is asked for, which is only for loopback
    max_body_bytes: int = 8 << 20
    body_timeout_s: float = 15.0  #: for the whole body of a request
    max_requests: int = 288  #: that send or wait for faces at one time; more are refused before they are read


class Guard:
    """ASGI middleware: key, origin, size and time of every request, and its place in the statistics.

    Without a key only requests that name a loopback host are answered, and none that a page of another site sends: a
    browser on this machine must not hand the gallery to every page that it shows.
    """

    def __init__(self, app: ASGIApp, settings: GuardSettings, stats: ServiceStats) -> None:
        self._app, self._settings, self._stats = app, settings, stats
        self._working = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, read the body, hand on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        finished = time.perf_counter()
        is_work = scope["method"] == "POST" and scope["path"] not in _PUBLIC

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        body: bytes | tuple[int, str] | None = self._stranger(scope) or (self._overload() if is_work else None)
        is_work = is_work and body is None  # who is refused does not take the place of another
        self._working += is_work
        try:
            if body is None:
                limit = self._settings.max_body_bytes if is_work else _SMALL_BODY_BYTES
                body = await self._body(scope, receive, limit)
            finished = time.perf_counter()
            if isinstance(body, tuple):
                await answer(send_counted, *body)
            else:
                await self._app(scope, _replay(body, receive), send_counted)
        finally:
            self._working -= is_work
            route = getattr(scope.get("route"), "path", "other")
            self._stats.count_request(route, status, time.perf_counter() - finished)

    def _overload(self) -> tuple[int, str] | None:
        if self._working < self._settings.max_requests:
            return None
        return 503, f"{self._working} requests are being answered; try again in a moment."

    def _stranger(self, scope: Scope) -> tuple[int, str] | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        origin = headers.get(b"origin")
        if origin is not None and origin.partition("://")[2] != host:
            return 403, "Requests from pages of other sites are refused."
        key = self._settings.access_key
        if key is None:
            if not is_loopback(_name_of(host)):
                return 403, "Without an access key the service answers on localhost only."
            return None
        if scope["path"] in _PUBLIC:
            return None
        scheme, _, given = headers.get(b"authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), key.encode()):
            return 401, "An access key is needed: send `Authorization: Bearer KEY`."
        return None

    async def _body(self, scope: Scope, receive: Receive, limit: int) -> bytes | tuple[int, str]:
        too_large = 413, f"The request is larger than the limit of {limit / 2**20:g} MiB."
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limit:
            return too_large
        parts, received = [], 0
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return 400, "The request ended before its body was complete."
                    part = message.get("body", b"")
                    received += len(part)
                    if received > limit:
                        return too_large
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            return 408, f"The request did not arrive within {self._settings.body_timeout_s:g} s."


def is_loopback(name: str) -> bool:
    """Whether a host name or address means this machine."""
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _name_of(host: str) -> str:
    """`name`, `name:port`, `[::1]:port` without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _replay(body: bytes, receive: Receive) -> Receive:
    is_sent = False

    async def replayed() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def answer(send: Send, status: int, text: str) -> None:
    """Send an answer of the form `Problem`."""
    body = json.dumps({"error": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 503:
        headers.append((b"retry-after", b"1"))
    if status in (400, 408, 413, 503):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
