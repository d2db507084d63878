"""Around every request, before the application sees it: who asks, how large it is, what the log says.

The body is read here, whole and within limits, so that the application meets only bodies that are there.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from internlm2.engine.async_llm import PieceStream
from internlm2.serve import errors
from internlm2.serve.errors import FORBIDDEN, TIMEOUT, TOO_LARGE, UNAUTHORIZED, UNSUPPORTED_MEDIA, ApiError
from internlm2.serve.gate import Slot
from internlm2.serve.keys import owner
from internlm2.serve.service import Service
from internlm2.serve.settings import is_loopback

_log = logging.getLogger(__name__)
_EXCHANGE = "internlm2.exchange"
# Without a key: what tells a supervisor that the server lives, and the web page, which asks for the key itself.
_OPEN_PATHS = frozenset({"/", "/health", "/ready", "/favicon.ico"})
_OPEN_PREFIX = "/web/"
_QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})
LEFT = 499  # in the log: the client went away


@dataclass(eq=False)
class Exchange:
    """One request: who asks, what it holds, and what the log tells of it. All it holds goes when it is over."""

    request_id: str
    key: str | None = None
    status: int | None = None
    started: float = field(default_factory=time.monotonic)
    first_token_seconds: float | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    slots: list[Slot] = field(default_factory=list)
    streams: list[PieceStream] = field(default_factory=list)
    said: list[str] | None = None  # the answer, where the log is to have it

    def note(self, text: str) -> None:
        """Keep text of the answer, where the log is to have it."""
        if self.said is not None:
            self.said.append(text)

    def count(self, num_tokens: int) -> None:
        """Note tokens of an answer as they come."""
        if self.first_token_seconds is None:
            self.first_token_seconds = time.monotonic() - self.started
        self.num_output_tokens += num_tokens

    async def close(self) -> None:
        """Let go of the engine's requests and of the places."""
        for stream in self.streams:
            await stream.aclose()
        for slot in self.slots:
            slot.release()


def exchange_of(scope: Scope) -> Exchange:
    """The exchange of a request."""
    return scope[_EXCHANGE]


class Guard:
    """ASGI around an application."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._settings = service.settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; everything else, such as the start of the application, passes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(secrets.token_hex(12))
        scope[_EXCHANGE] = exchange
        sender = self._sender(exchange, send)
        try:
            await self._serve(scope, receive, sender, exchange)
        except ApiError as error:
            await self._refuse(error, scope, receive, sender, exchange)
        except Exception:
            _log.exception("Request %s failed.", exchange.request_id)
            await self._refuse(errors.failed(), scope, receive, sender, exchange)
        finally:
            await exchange.close()
            self._tell(scope, exchange)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        headers = Headers(scope=scope)
        self._check_host(headers)
        exchange.key = self._key_of(scope, headers)
        body = await self._read(headers, receive)
        if body is None:
            return  # the client left while it wrote
        if self._settings.logs_prompts and body:
            exchange.said = []
            _log.info("Request %s: %s", exchange.request_id, body.decode("utf-8", "replace"))
        # HEAD is GET without the body, which uvicorn leaves out.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            await self._app(inner, _replay(body, receive), send)
        finally:
            scope["route"] = inner.get("route")

    def _check_host(self, headers: Headers) -> None:
        """A web page whose name is made to lead to 127.0.0.1 must not reach a server that asks for no key."""
        settings = self._settings
        if settings.keys or not settings.is_loopback:
            return
        host = headers.get("host", "").strip()
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if name and not is_loopback(name) and name not in settings.allowed_hosts:
            raise ApiError(
                FORBIDDEN,
                f"The Host header is {host!r}, but this server is meant for this machine alone. Start it with "
                f"--allowed-host {name} if that name is right, or with --keys.",
                code="host_not_allowed",
            )

    def _key_of(self, scope: Scope, headers: Headers) -> str | None:
        path = scope["path"]
        if not self._settings.keys or path in _OPEN_PATHS or path.startswith(_OPEN_PREFIX):
            return None
        scheme, _, key = headers.get("authorization", "").encode("latin-1").partition(b" ")
        name = owner(self._settings.keys, key.strip()) if scheme.lower() == b"bearer" else None
        if name is None:
            what = "is not known here" if key else "is missing"
            raise ApiError(
                UNAUTHORIZED,
                f"The API key {what}. Send it as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return name

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        limit, told = self._settings.body_bytes, headers.get("content-length", "0")
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity":
            raise ApiError(
                UNSUPPORTED_MEDIA,
                f"The body has the content-encoding {encoding!r:.40}. Send it as it is, not compressed.",
                code="unsupported_content_encoding",
                headers={"connection": "close"},
            )
        parts: list[bytes] = []
        size = int(told) if told.isascii() and told.isdigit() and len(told) < 20 else 0
        num_read = 0
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                while size <= limit:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    num_read += len(parts[-1])
                    size = max(size, num_read)
                    if size <= limit and not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError as error:
            raise ApiError(
                TIMEOUT,
                f"The body did not come within {self._settings.body_seconds:g} s.",
                code="body_timeout",
                headers={"connection": "close"},
            ) from error
        raise ApiError(
            TOO_LARGE,
            f"The body is larger than {limit} bytes. Send less, or raise --body-mib.",
            code="body_too_large",
            headers={"connection": "close"},
        )

    def _sender(self, exchange: Exchange, send: Send) -> Send:
        async def sender(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", exchange.request_id.encode()),
                ]
            await send(message)

        return sender

    async def _refuse(
        self, error: ApiError, scope: Scope, receive: Receive, send: Send, exchange: Exchange
    ) -> None:
        if exchange.status is None:  # else part of an answer is gone already: the connection just ends
            await error.response()(scope, receive, send)

    def _tell(self, scope: Scope, exchange: Exchange) -> None:
        """One line for the log, without what was said unless that is asked for, and the counters."""
        if exchange.said:
            _log.info("Answer to %s: %s", exchange.request_id, "".join(exchange.said))
        seconds = time.monotonic() - exchange.started
        status = exchange.status or LEFT
        route = scope.get("route")
        path = route.path if isinstance(route, Route) else "other"
        metrics = self._service.metrics
        metrics.requests.labels(path, str(status)).inc()
        metrics.seconds.labels(path).observe(seconds)
        if exchange.first_token_seconds is not None:
            metrics.first_token_seconds.observe(exchange.first_token_seconds)
        if scope["path"] in _QUIET_PATHS and status < 400:
            return
        _log.info(
            "%s %s %d %.3f s key=%s in=%d out=%d id=%s",
            scope["method"],
            path if path != "other" else repr(scope["path"][:80]),
            status,
            seconds,
            exchange.key or "-",
            exchange.num_prompt_tokens,
            exchange.num_output_tokens,
            exchange.request_id,
        )


def _replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """The body that was read, then whatever comes: the client's leaving."""
    pending = [body]

    async def replay() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return replay
