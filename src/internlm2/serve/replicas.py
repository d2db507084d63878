"""Several copies of the server behind one address, by Ray Serve: on this machine, or on a cluster that Ray knows.

Each replica is a process with its own model and the same application; Ray's proxy spreads requests over them, starts
a replica again that has died, and lets open answers end before it stops one. Only this file and ray_router.py import
Ray Serve.
"""

import logging
import os
import secrets
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from starlette.types import ASGIApp

from internlm2.engine.llm import LLM
from internlm2.engine.reward import RewardScorer
from internlm2.errors import ConfigError, MissingDependencyError
from internlm2.serve import conversation
from internlm2.serve.app import create_app
from internlm2.serve.server import bind
from internlm2.serve.service import Service
from internlm2.serve.settings import ServeSettings

_APPLICATION = "internlm2"


@dataclass(frozen=True)
class ReplicaPlan:
    """How many copies run, and what each is made of.

    load: makes the model, in the replica's process. num_cpus, num_gpus: what Ray sets aside for each.
    """

    num_replicas: int
    load: Callable[[], LLM | RewardScorer]
    settings: ServeSettings
    adapter: str | None = None
    num_cpus: int = 1
    num_gpus: int = 0

    def __post_init__(self) -> None:
        if self.num_replicas < 1:
            raise ConfigError(f"replicas is {self.num_replicas}, but must be at least 1.")


class _Replica:
    """One copy, in a process of Ray's."""

    def __init__(self, plan: ReplicaPlan) -> None:
        import torch

        from internlm2 import log

        log.configure()
        torch.set_num_threads(plan.num_cpus)
        self._model = plan.load()
        self._service = Service.of(self._model, plan.settings, adapter=plan.adapter)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return create_app(self._service)

    def __del__(self) -> None:
        self._model.close()


def serve_replicas(plan: ReplicaPlan, *, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C. on_ready: called with the address.

    A cluster is used where RAY_ADDRESS names one. Raises ConfigError when the port is taken or a replica cannot start.
    """
    _guard_local_cluster()
    try:
        import ray
        from ray import serve
        from ray.serve.config import RequestRouterConfig
    except ImportError as error:
        raise MissingDependencyError(
            f"Replicas need {error.name}, which is not installed. Install it with: pip install 'internlm2[ray]'"
        ) from error

    settings = plan.settings
    port = _free_port(settings)
    ray.init(
        address=os.environ.get("RAY_ADDRESS"),
        include_dashboard=False,
        logging_level=logging.WARNING,
        configure_logging=False,
        log_to_driver=True,
        runtime_env={"env_vars": _variables()},
    )
    before = signal.signal(signal.SIGTERM, _end)  # Ray's own would abort
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={
                "host": settings.host,
                "port": port,
                "request_timeout_s": settings.request_seconds + settings.drain_seconds,
                "keep_alive_timeout_s": max(1, round(settings.keep_alive_seconds)),
            },
        )
        deployment = serve.deployment(
            serve.ingress()(_Replica),
            name=_APPLICATION,
            num_replicas=plan.num_replicas,
            max_ongoing_requests=settings.max_running + settings.max_queue + 16,  # the gate refuses before
            graceful_shutdown_timeout_s=settings.drain_seconds,
            ray_actor_options={"num_cpus": plan.num_cpus, "num_gpus": plan.num_gpus},
            request_router_config=RequestRouterConfig(
                request_router_class="internlm2.serve.ray_router:ConversationRouter"
            ),
        )
        try:
            serve.run(deployment.bind(plan), name=_APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise ConfigError(f"The replicas could not start: {error}") from error
        shown = f"[{settings.host}]" if ":" in settings.host else settings.host
        on_ready(f"http://{shown}:{port}")
        threading.Event().wait()  # Ctrl-C raises KeyboardInterrupt, as everywhere
    except _EndedError:
        pass
    finally:
        serve.shutdown()
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def _guard_local_cluster() -> None:
    """A cluster of our own asks for a token: Ray listens on every address, and runs what it is sent.

    Whoever has a cluster (RAY_ADDRESS) has decided that for it. Must come before Ray is imported.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_ADDRESS" not in os.environ and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _variables() -> dict[str, str]:
    """The environment of Ray's processes. The proxy reads from it what to put around itself, and names its sessions."""
    callback = conversation.proxy_middlewares
    return {
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "3000"),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{callback.__module__}.{callback.__name__}",
        "RAY_SERVE_SESSION_ID_HEADER_KEY": conversation.HEADER,
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # of 5: a busy machine starts the proxy slowly
    }


class _EndedError(Exception):
    """SIGTERM came."""


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end has begun
    raise _EndedError


def _free_port(settings: ServeSettings) -> int:
    """The port to listen on: the one that was asked for, or any for 0. Raises ConfigError when it is taken."""
    with bind(settings) as listener:
        return listener.getsockname()[1]
