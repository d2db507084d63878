"""A connection: uvicorn's, with limits on silence and number, and refusals in OpenAI's shape."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from internlm2.serve import errors
from internlm2.serve.settings import ServeSettings


def connection_class(settings: ServeSettings) -> type[H11Protocol]:
    """What uvicorn makes of each connection of one server."""
    return type("Connection", (_Connection,), {"settings": settings})


class _Connection(H11Protocol):
    """One connection. What uvicorn itself answers is told as everything else is."""

    settings: ServeSettings  # each server makes a class of its own
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyrefly: ignore - as uvicorn has it
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            self.app = errors.crowded(self.settings.max_connections).response()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.conn.trailing_data[0]:
            self._watch()

    def _watch(self) -> None:
        """The time for a head begins with the connection, or with its first byte on one that was used."""
        is_waiting = self.cycle is None or self.cycle.response_complete
        if not is_waiting:
            self._stop_watching()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.settings.header_seconds, self._close_slow)

    def _stop_watching(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close_slow(self) -> None:
        self._head_timer = None
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Bytes that are no HTTP. After an answer has begun there is nothing left to say."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        told = errors.not_http().response()
        self.transport.write(
            self.conn.send(h11.Response(status_code=told.status_code, headers=told.raw_headers))
        )
        self.transport.write(self.conn.send(h11.Data(data=bytes(told.body))))
        self.transport.write(self.conn.send(h11.EndOfMessage()))
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Whoever asks for a WebSocket is answered by HTTP; the log has its line as of every request."""
