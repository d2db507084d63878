"""How a server runs: address, limits, who may call it. Checked where it is made."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field

from internlm2.engine.sampling.params import SamplingParams
from internlm2.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """The settings of one server. Raises ConfigError for values that cannot be meant.

    host, port: where it listens; port 0 takes a free one. model_name: how clients name the model. keys: SHA-256 of
    each API key, as bytes, by the name of its owner; empty: nobody needs a key. insecure: allow a public address
    without a key. allowed_hosts: names that the Host header may give besides the loopback ones, where no key is asked
    for. cors_origins: web pages of other servers that may call, "*" for all.

    defaults: what a request that does not say gets. max_running: requests that are answered at once; max_queue: how
    many more may wait; max_per_key: of both, for one key. Each of the `n` answers, and each text of a list, counts.

    body_bytes, body_seconds: the largest body, and how long it may take to come. header_seconds: the same for the
    head of a request. request_seconds: how long an answer may take, waiting included. drain_seconds: how long open
    answers may go on after SIGTERM. keep_alive_seconds: how long an idle connection stays. max_connections: open
    connections at once. logs_prompts: write prompts and answers into the log.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str = "internlm2"
    keys: Mapping[str, bytes] = field(default_factory=dict)
    insecure: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    defaults: SamplingParams = field(default_factory=SamplingParams)
    max_running: int = 64
    max_queue: int = 256
    max_per_key: int = 64
    body_bytes: int = 8 * MIB
    body_seconds: float = 30.0
    header_seconds: float = 10.0
    request_seconds: float = 600.0
    drain_seconds: float = 30.0
    keep_alive_seconds: float = 15.0
    max_connections: int = 1024
    logs_prompts: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}, but must be from 0 (any free one) to 65535.")
        for name in ("max_running", "max_per_key", "body_bytes", "max_connections"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        if self.max_queue < 0:
            raise ConfigError(f"max_queue is {self.max_queue}, but must be at least 0 (nobody waits).")
        for name in ("body_seconds", "header_seconds", "request_seconds", "keep_alive_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be above 0.")
        if not self.drain_seconds >= 0:
            raise ConfigError(f"drain_seconds is {self.drain_seconds}, but must be at least 0.")
        if not self.model_name:
            raise ConfigError("The served name is empty. Give one, as in --served-name internlm2-chat-7b.")
        if not (self.is_loopback or self.keys or self.insecure):
            raise ConfigError(
                f"{self.host} can be reached by others, and no key is asked for. Make a key with `internlm2 key NAME "
                "--keys FILE` and give --keys FILE; or say --insecure if everybody may use it."
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this machine reach the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether an address, or the name `localhost`, means this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"
