"""A real server on a loopback port, in a thread of the tests."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from openai import OpenAI

from internlm2 import SamplingParams
from internlm2.serve.server import Server, bind
from internlm2.serve.service import Service
from internlm2.serve.settings import ServeSettings

DEFAULTS = SamplingParams(max_tokens=16, temperature=0.0)


@dataclass
class Running:
    """A server that runs. url: without /v1."""

    url: str
    port: int
    service: Service
    server: Server
    thread: threading.Thread

    def client(self, **options) -> OpenAI:
        return OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60} | options
        )

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def running(model, *, adapter: str | None = None, **options) -> Iterator[Running]:
    """Serve `model` until the block ends; then nothing of any request may be left."""
    settings = ServeSettings(**{"port": 0, "model_name": "tiny"} | options)
    service = Service.of(model, settings, adapter=adapter)
    with bind(settings) as listener:
        server = Server(service)
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_for(lambda: server.started, 120)
        found = Running(f"http://127.0.0.1:{port}", port, service, server, thread)
        try:
            yield found
        finally:
            found.stop()
    assert_idle(service)


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def assert_idle(service: Service) -> None:
    """No request is open, no page is held."""
    engine = service.frontend.engine
    wait_for(lambda: service.gate.num_open == 0 and not engine.has_work, 20)
    service.frontend.settle()
    assert not service.frontend._streams
    engine.scheduler.check_integrity()
    assert engine.scheduler.pool.num_held == 0
