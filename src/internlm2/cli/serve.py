"""`internlm2 serve`: a model behind an OpenAI-compatible API, and `internlm2 key`, which makes keys for it."""

import os
import re
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from internlm2.cli import options
from internlm2.cli.options import RunConfig, RunFlags
from internlm2.errors import ConfigError, MissingDependencyError, RequestError

if TYPE_CHECKING:
    from internlm2.engine.llm import LLM
    from internlm2.engine.reward import RewardScorer
    from internlm2.serve.settings import ServeSettings

KEY_VARIABLE = "INTERNLM2_API_KEY"
_KEY_OWNER = "(environment)"  # no name in a file of keys looks so
_ADAPTER = re.compile(r"([\w.:/-]{1,64})=(.+)", flags=re.S)


@dataclass(frozen=True, kw_only=True)
class ServeConfig(RunConfig):
    """What `serve` needs to know besides; the keys of its `--config` file."""

    host: str = "127.0.0.1"
    port: int = 8000
    served_name: str | None = None
    keys: str | None = None
    insecure: bool = False
    allowed_host: tuple[str, ...] = ()
    cors_origin: tuple[str, ...] = ()
    max_running: int = 64
    max_queue: int = 256
    max_per_key: int = 64
    body_mib: float = 8.0
    request_seconds: float = 600.0
    drain_seconds: float = 30.0
    log_prompts: bool = False
    replicas: int = 1
    adapters: dict[str, str] = field(default_factory=dict)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServeFlags:
    """The same, as flags; None means: not given."""

    host: Annotated[str | None, Parameter(help="Address to listen on [127.0.0.1: this machine alone].")] = (
        None
    )
    port: Annotated[int | None, Parameter(help="Port; 0 takes a free one [8000].")] = None
    served_name: Annotated[
        str | None, Parameter(help="What clients write as `model`; default: the end of MODEL.")
    ] = None
    keys: Annotated[
        str | None,
        Parameter(
            help=f"File of hashed API keys, made by `internlm2 key`. One key may be in ${KEY_VARIABLE}."
        ),
    ] = None
    insecure: Annotated[bool | None, Parameter(help="Allow a public address without a key.", negative=())] = (
        None
    )
    allowed_host: Annotated[
        tuple[str, ...] | None,
        Parameter(help="Name that a Host header may give besides localhost; only without keys.", negative=()),
    ] = None
    cors_origin: Annotated[
        tuple[str, ...] | None,
        Parameter(
            help="Web page that may call from a browser, as https://example.org; * is all.", negative=()
        ),
    ] = None
    max_running: Annotated[int | None, Parameter(help="Answers that are computed at once [64].")] = None
    max_queue: Annotated[int | None, Parameter(help="Answers that may wait; more get status 429 [256].")] = (
        None
    )
    max_per_key: Annotated[int | None, Parameter(help="Open answers of one key [64].")] = None
    body_mib: Annotated[float | None, Parameter(help="Largest request, in MiB [8].")] = None
    request_seconds: Annotated[float | None, Parameter(help="Longest time for one answer [600].")] = None
    drain_seconds: Annotated[
        float | None, Parameter(help="Time for open answers after SIGTERM or Ctrl-C [30].")
    ] = None
    log_prompts: Annotated[
        bool | None, Parameter(help="Write requests and answers into the log.", negative=())
    ] = None
    replicas: Annotated[
        int | None, Parameter(help="Copies of the model, each a process of Ray's, behind one address [1].")
    ] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServedModelFlags(RunFlags):
    """How the model runs, and any number of adapters."""

    adapter: Annotated[  # pyrefly: ignore - several here, one everywhere else
        tuple[str, ...] | None,
        Parameter(
            help="LoRA folder in the PEFT format, always used; or NAME=FOLDER, a model of its own. May be repeated.",
            negative=(),
        ),
    ] = None


def serve(
    model: Annotated[str, Parameter(help="Folder, GGUF file, Hugging Face id, or `demo`.")] = "demo",
    *,
    server: ServeFlags | None = None,
    flags: ServedModelFlags | None = None,
) -> None:
    """Serve a model until Ctrl-C. Sampling options are the defaults of requests that do not say."""
    config = _resolve(server, flags)
    settings = _settings(model, config)
    try:
        from internlm2.serve.server import bind, serve
        from internlm2.serve.service import Service
    except ImportError as error:
        raise MissingDependencyError(
            f"serve needs {error.name}, which is not installed. Install it with: pip install 'internlm2[serve]'"
        ) from error

    if config.replicas != 1:
        _serve_replicas(model, config, settings)
        return
    with bind(settings) as listener:  # before the model is loaded, which takes time
        loaded = _load(model, config)
        service = Service.of(loaded, settings, adapter=options.adapter_name(config))
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"Serving {settings.model_name} at http://{shown}:{port}/v1 (Ctrl-C ends)", file=sys.stderr)
        if not settings.is_loopback and not settings.keys:
            print("Everybody who reaches this address may use it: there is no key.", file=sys.stderr)
        try:
            serve(service, listener)
        finally:
            loaded.close()


def _serve_replicas(model: str, config: ServeConfig, settings: "ServeSettings") -> None:
    from internlm2.serve.replicas import ReplicaPlan, serve_replicas

    plan = ReplicaPlan(
        config.replicas,
        partial(_load, model, config),
        settings,
        adapter=options.adapter_name(config),
        num_cpus=config.threads or max(1, (os.cpu_count() or 1) // max(1, config.replicas)),
        num_gpus=config.tensor_parallel if options.device_of(config).startswith("cuda") else 0,
    )
    serve_replicas(
        plan,
        on_ready=lambda address: print(
            f"Serving {config.replicas} x {settings.model_name} at {address}/v1 (Ctrl-C ends)",
            file=sys.stderr,
        ),
    )


def key(
    name: Annotated[str, Parameter(help="Whose key it is, for the log and for limits.")],
    *,
    keys: Annotated[Path, Parameter(help="File to add the key's hash to.")],
) -> None:
    """Make an API key for `serve --keys FILE`. It is printed once; the file holds its hash alone."""
    from internlm2.serve.keys import add_key

    print(add_key(keys, name))


def _resolve(server: ServeFlags | None, flags: ServedModelFlags | None) -> ServeConfig:
    """One configuration from file and flags. Raises ConfigError for unknown keys and wrong types."""
    from internlm2.config import from_dict, load_toml

    run = flags or ServedModelFlags()
    adapters = _adapters(run.adapter or ())
    given = {**asdict(run), **asdict(server or ServeFlags()), **adapters}
    given = {name: value for name, value in given.items() if value is not None and name != "config"}
    if run.config is not None:
        return load_toml(ServeConfig, run.config, overrides=given)
    return from_dict(ServeConfig, given, where="command line")


def _adapters(given: tuple[str, ...]) -> dict[str, object]:
    """What `--adapter` says, as keys of the configuration. Raises ConfigError."""
    always: list[str] = []
    named: dict[str, str] = {}
    for text in given:
        match = None if Path(text).exists() else _ADAPTER.fullmatch(text)
        if match is None:
            always.append(text)
        elif match[1] in named:
            raise ConfigError(f"--adapter gives {match[1]!r} twice. Each adapter needs a name of its own.")
        else:
            named[match[1]] = match[2]
    if len(always) > 1:
        raise ConfigError(
            f"--adapter gives {' and '.join(map(repr, always))} without names. Write NAME=FOLDER; clients then choose "
            "by `model`."
        )
    return {"adapter": always[0] if always else None, "adapters": named or None}


def _settings(model: str, config: ServeConfig) -> "ServeSettings":
    from internlm2.serve.keys import digest, read_keys
    from internlm2.serve.settings import MIB, ServeSettings

    keys = {} if config.keys is None else read_keys(Path(config.keys))
    given = os.environ.get(KEY_VARIABLE, "")
    if given and not given.strip():
        raise ConfigError(f"${KEY_VARIABLE} holds only blanks, which no client can send. Give it a key.")
    if given:
        keys[_KEY_OWNER] = digest(given.strip())  # files of secrets often end with a line break
    model_name = config.served_name or (Path(model).resolve().name if Path(model).exists() else model)
    for name in {model_name, options.ADAPTER} & set(config.adapters):
        raise ConfigError(
            f"An adapter cannot be called {name!r}, which means something else here. Rename it."
        )
    return ServeSettings(
        host=config.host.strip("[]"),
        port=config.port,
        model_name=model_name,
        keys=keys,
        insecure=config.insecure,
        allowed_hosts=config.allowed_host,
        cors_origins=config.cors_origin,
        defaults=options.sampling(config),
        max_running=config.max_running,
        max_queue=config.max_queue,
        max_per_key=config.max_per_key,
        body_bytes=int(config.body_mib * MIB),
        request_seconds=config.request_seconds,
        drain_seconds=config.drain_seconds,
        logs_prompts=config.log_prompts,
    )


def _load(model: str, config: ServeConfig) -> "LLM | RewardScorer":
    """A language model, or a reward model where the folder holds one."""
    from internlm2.checkpoint.open import open_checkpoint
    from internlm2.checkpoint.resolve import resolve_model
    from internlm2.engine.reward import RewardScorer

    if open_checkpoint(resolve_model(model)).config.head != "reward":
        return options.load_llm(model, config, max_num_seqs=config.max_running, adapters=config.adapters)
    if config.adapter or config.adapters:
        raise RequestError(f"{model} is a reward model, which takes no adapter. Leave --adapter off.")
    import torch

    if config.threads:
        torch.set_num_threads(config.threads)
    device = options.device_of(config)
    dtype = "float32" if config.dtype == "auto" and device == "cpu" else config.dtype
    dtype = "bfloat16" if dtype == "auto" else dtype
    return RewardScorer(model, dtype=dtype, device=device, tensor_parallel=config.tensor_parallel)
