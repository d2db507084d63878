"""The process: sockets and signals. uvicorn does the work.

SIGTERM or Ctrl-C: no new requests, open answers go on for `drain_seconds`, then they are told and ended. A second
Ctrl-C ends at once.
"""

import logging
import signal
import socket
import sys
import threading
from types import FrameType

import uvicorn

from internlm2.errors import ConfigError
from internlm2.serve.app import create_app
from internlm2.serve.connection import connection_class
from internlm2.serve.service import Service
from internlm2.serve.settings import ServeSettings

_log = logging.getLogger(__name__)
_STALLED_MILLISECONDS = 120_000
_GRACE_SECONDS = 5.0  # for the last words of answers that were ended


class Server(uvicorn.Server):
    """uvicorn's server, which tells the service when the end begins."""

    def __init__(self, service: Service) -> None:
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=connection_class(settings),
                ws="none",
                lifespan="on",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=max(1, round(settings.keep_alive_seconds)),
                timeout_graceful_shutdown=max(1, round(settings.drain_seconds + _GRACE_SECONDS)),
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
    host = settings.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":  # a client that is there and does not read is dropped
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALLED_MILLISECONDS)
        listener.bind((host, settings.port))
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, settings.port, error) from error
    listener.set_inheritable(False)
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"Cannot listen on {host}:{port}: {error.strerror or error}. Choose another --port or --host; --port 0 takes a "
        "free one."
    )


def serve(service: Service, listener: socket.socket) -> None:
    """Serve until a signal ends it. Must run in the main thread for signals to be heard.

    Raises ConfigError when another server has taken the port since it was bound.
    """
    try:
        listener.listen(min(2048, service.settings.max_connections))
    except OSError as error:
        raise _cannot_listen(service.settings.host, listener.getsockname()[1], error) from error

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
