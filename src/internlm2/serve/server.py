"""The process: sockets, signals, and connections that send nothing. uvicorn does the work.

SIGTERM or Ctrl-C: no new requests, open answers go on for `drain_seconds`, then they are told and ended. A second
Ctrl-C ends at once.
"""

import asyncio
import logging
import signal
import socket
import sys
import threading
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from internlm2.errors import ConfigError
from internlm2.serve.app import create_app
from internlm2.serve.service import Service
from internlm2.serve.settings import ServeSettings

_log = logging.getLogger(__name__)
_STALLED_MILLISECONDS = 120_000
_GRACE_SECONDS = 5.0  # for the last words of answers that were ended


class _Protocol(H11Protocol):
    """Closes a connection whose request head does not come in time; uvicorn waits for ever."""

    header_seconds = 10.0  # of the settings; each server makes a class of its own

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyrefly: ignore - as uvicorn has it
        super().connection_made(transport)
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
            self._head_timer = self.loop.call_later(self.header_seconds, self._close_slow)

    def _stop_watching(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close_slow(self) -> None:
        self._head_timer = None
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server, which tells the service when the end begins."""

    def __init__(self, service: Service) -> None:
        settings = service.settings
        protocol = type("Protocol", (_Protocol,), {"header_seconds": settings.header_seconds})
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=protocol,
                ws="none",
                lifespan="on",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=max(1, round(settings.keep_alive_seconds)),
                timeout_graceful_shutdown=max(1, round(settings.drain_seconds + _GRACE_SECONDS)),
                limit_concurrency=settings.max_connections,
                backlog=min(2048, settings.max_connections),
            )
        )
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let open answers go on for a while, then end them."""
        self._service.gate.drain()
        if self._service.gate.num_open:
            _log.info(
                "Shutting down: %d answers have %g s left.",
                self._service.gate.num_open,
                self._service.settings.drain_seconds,
            )
        await super().shutdown(sockets)


def bind(settings: ServeSettings) -> socket.socket:
    """A listening socket. Raises ConfigError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":  # a client that is there and does not read is dropped
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALLED_MILLISECONDS)
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Cannot listen on {settings.host}:{settings.port}: {error.strerror or error}. Choose another --port or "
            "--host; --port 0 takes a free one."
        ) from error
    listener.set_inheritable(False)
    return listener


def serve(service: Service, listener: socket.socket) -> None:
    """Serve until a signal ends it. Must run in the main thread for signals to be heard."""

    def ended(number: int, frame: FrameType | None) -> None:
        """uvicorn raises the signal again at the end; the work is done then."""

    server = Server(service)
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, ended)
        try:
            server.run(sockets=[listener])
        finally:
            signal.signal(signal.SIGTERM, before)
    else:
        server.run(sockets=[listener])
