"""Answers while the client is there: streams of server-sent events, and plain answers. Whoever leaves ends the work."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from internlm2.serve import errors
from internlm2.serve.errors import ApiError
from internlm2.serve.gate import Gate
from internlm2.serve.guard import LEFT, exchange_of

T = TypeVar("T")
_log = logging.getLogger(__name__)
_LAST_WORD_SECONDS = 2.0  # for a client that reads slowly to take the news of an error
DONE = b"data: [DONE]\n\n"


def event(data: object, name: str | None = None) -> bytes:
    """One server-sent event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode("utf-8", "replace")


def error_event(error: ApiError) -> bytes:
    """An error within a stream, as OpenAI's clients read it."""
    return event(error.body)


class EventStream(Response):
    """Sends events as they come. gate: bounds the time. failure: how an error is told within the stream."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        gate: Gate,
        failure: Callable[[ApiError], bytes] = error_event,
    ) -> None:
        self._events = events
        self._gate = gate
        self._failure = failure
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the events or the client are over."""
        await _while_there(self._send(scope, send), receive)

    async def _send(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last = b""
        try:
            async with self._gate.limit(), aclosing(self._events) as events:
                async for each in events:
                    await send({"type": "http.response.body", "body": each, "more_body": True})
        except Exception as error:
            told = errors.from_exception(error)
            if told is None:
                _log.exception("Request %s failed while it was answered.", exchange_of(scope).request_id)
                told = errors.failed()
            last = self._failure(told)
        try:
            async with asyncio.timeout(_LAST_WORD_SECONDS):
                await send({"type": "http.response.body", "body": last, "more_body": False})
        except TimeoutError:
            _log.info("The client of request %s does not read.", exchange_of(scope).request_id)


class ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


async def answer(request: Request, gate: Gate, work: Awaitable[T]) -> T:
    """Do `work` while the client waits. Raises ClientLeftError, and ApiError when it takes too long."""

    async def limited() -> T:
        async with gate.limit():
            return await work

    result = await _while_there(limited(), request.receive)
    if result is None:
        raise ClientLeftError
    return result[0]


def nobody() -> Response:
    """What is "sent" to a client that has left."""
    return Response(status_code=LEFT)


async def _while_there(work: Awaitable[T], receive: Receive) -> tuple[T] | None:
    """The result of `work`; None when the client left before. `work` is cancelled then, and has ended here."""

    async def leaving() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def working() -> T:
        return await work

    worker, watcher = asyncio.create_task(working()), asyncio.create_task(leaving())
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
    finally:
        is_complete = worker.done()
        for task in (worker, watcher):
            task.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)
    return (worker.result(),) if is_complete else None
