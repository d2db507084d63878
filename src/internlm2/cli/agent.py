"""`internlm2 agent`: a question answered with tools, or a conversation; and transcripts run again."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from internlm2.cli import options
from internlm2.cli.main import USER_ERROR
from internlm2.cli.options import RunConfig, RunFlags
from internlm2.errors import InternLM2Error, RequestError

if TYPE_CHECKING:
    from internlm2.agent import Limits, Model, Outcome, Session, Tool

_DIFFERENT = 1  # as `doctor` tells a finding
_OF_ENDPOINTS = ("max_tokens", "temperature", "top_p", "seed")
_WELCOME = "Type a question; Ctrl-C stops an answer, Ctrl-D leaves."


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ToolFlags:
    """What the model may use, and how far it may go."""

    tool: Annotated[
        tuple[Literal["calculator", "python"], ...] | None,
        Parameter(
            help="calculator or python (in the sandbox); may be given twice. Default: both.", negative=()
        ),
    ] = None
    files: Annotated[Path | None, Parameter(help="Folder whose text files it may read.")] = None
    mcp: Annotated[
        tuple[str, ...] | None,
        Parameter(
            help="MCP server: '[NAME=]COMMAND ARGUMENTS' or '[NAME=]http://...'; repeatable.", negative=()
        ),
    ] = None
    loop: Annotated[
        Literal["auto", "native", "react", "interpreter"],
        Parameter(help="How it calls: its own way, ReAct text, code only; auto: its own way if it has one."),
    ] = "auto"
    constrain: Annotated[
        bool, Parameter(help="Hold the arguments of calls to the tools' schemas.", negative=())
    ] = False
    max_turns: Annotated[int | None, Parameter(help="Answers of the model to one question [12].")] = None
    max_seconds: Annotated[float | None, Parameter(help="Time for one question [600].")] = None
    max_total_tokens: Annotated[
        int | None, Parameter(help="Tokens of all prompts and answers together; default: any.")
    ] = None
    tool_seconds: Annotated[float | None, Parameter(help="Time for one call of a tool [60].")] = None


def agent(
    model: Annotated[
        str, Parameter(help="Folder, GGUF file, Hugging Face id, or `demo`; with --endpoint its name there.")
    ],
    question: Annotated[
        str | None, Parameter(help="Without it a conversation begins; lines may be piped.")
    ] = None,
    *,
    system: Annotated[str | None, Parameter(help="System message that opens the conversation.")] = None,
    tools: ToolFlags | None = None,
    transcript: Annotated[Path | None, Parameter(help="New file for all that happens, JSON lines.")] = None,
    pictures: Annotated[Path | None, Parameter(help="Folder for the pictures that tools make.")] = None,
    replay: Annotated[Path | None, Parameter(help="Run a transcript again instead of asking.")] = None,
    live: Annotated[
        Literal["none", "model", "tools", "both"],
        Parameter(help="With --replay: what is not taken from the transcript but run."),
    ] = "none",
    endpoint: Annotated[
        str | None, Parameter(help="An OpenAI endpoint, such as http://localhost:8000/v1.")
    ] = None,
    api_key_env: Annotated[
        str | None, Parameter(help="Environment variable that holds the key of the endpoint.")
    ] = None,
    quiet: Annotated[bool, Parameter(help="Do not show the steps.", negative=())] = False,
    json_output: Annotated[
        bool, Parameter("--json", help="Print one JSON object an answer.", negative=())
    ] = False,
    flags: RunFlags | None = None,
) -> int:
    """Answer questions with tools. The answer goes to stdout, the steps to stderr."""
    given = tools or ToolFlags()
    config = options.resolve(flags)
    limits = _limits(given)
    if replay is None and live != "none":
        raise RequestError(f"--live {live} needs --replay FILE, which it is about.")
    with ExitStack() as stack:
        if replay is not None:
            own = _tools(given, stack) if live in ("tools", "both") else None
            chosen = _model(model, endpoint, api_key_env, config) if live in ("model", "both") else None
            return _replay(replay, chosen, own, quiet=quiet, json_output=json_output)
        from internlm2.agent import Agent, TranscriptWriter

        own = _tools(given, stack)
        listeners = _listeners(quiet, pictures)
        if transcript is not None:
            listeners.append(stack.enter_context(TranscriptWriter(transcript)))
        if not quiet and any(each.is_code for each in own):
            _tell_isolation()
        one = Agent(
            _model(model, endpoint, api_key_env, config),
            own,
            dialect=given.loop,
            system=system,
            limits=limits,
            constrain=given.constrain,
        )
        session = stack.enter_context(one.session(listeners=listeners))
        if question is not None:
            return _answer(session, question, json_output=json_output)
        return _converse(session, json_output=json_output)


def _converse(session: "Session", *, json_output: bool) -> int:
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(_WELCOME, file=sys.stderr)
    worst = 0
    for line in _questions(is_terminal):
        try:
            worst = max(worst, _answer(session, line, json_output=json_output))
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print("\n(stopped)", file=sys.stderr)
        except InternLM2Error as error:
            print(f"Error: {error}", file=sys.stderr)
            worst = USER_ERROR
    return 0 if is_terminal else worst


def _questions(is_terminal: bool) -> Iterator[str]:
    while True:
        try:
            line = input("> ") if is_terminal else sys.stdin.readline()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print("\n(Ctrl-D leaves.)", file=sys.stderr)
            continue
        if not is_terminal and not line:
            return
        if line.strip():
            yield line.strip()


def _answer(session: "Session", question: str, *, json_output: bool) -> int:
    outcome = session.ask(question)
    if json_output:
        print(json.dumps(_as_json(outcome), ensure_ascii=False), flush=True)
    else:
        from internlm2.agent.text import clean

        print(clean(outcome.answer), flush=True)
    if not outcome.is_answered:
        print(f"No whole answer: {outcome.reason} (--max-turns, --max-seconds, --max-total-tokens, --max-tokens)",
              file=sys.stderr)  # fmt: skip
        return USER_ERROR
    return 0


def _as_json(outcome: "Outcome") -> dict[str, object]:
    calls = [
        {**asdict(each.call), "status": each.status, "text": each.text, "num_pictures": len(each.pictures)}
        for each in outcome.calls
    ]
    return {
        "answer": outcome.answer,
        "ending": outcome.ending,
        "turns": outcome.turns,
        "calls": calls,
        "prompt_tokens": outcome.prompt_tokens,
        "output_tokens": outcome.output_tokens,
        "seconds": round(outcome.seconds, 3),
    }


def _replay(
    path: Path, model: "Model | None", tools: "Sequence[Tool] | None", *, quiet: bool, json_output: bool
) -> int:
    from internlm2.agent import Transcript
    from internlm2.agent import replay as run_again

    found = run_again(Transcript.load(path), model=model, tools=tools, listeners=_listeners(quiet, None))
    if json_output:
        print(json.dumps(asdict(found), ensure_ascii=False))
    else:
        from internlm2.agent.text import clean

        for each in found.differences:
            print(clean(f"{each.place}\n  recorded: {each.recorded}\n  now:      {each.now}"))
        end = "" if found.is_whole else " The transcript ends in the middle of a run."
        print(
            f"{found.num_replies} replies and {found.num_results} results, {len(found.differences)} differences.{end}"
        )
    return _DIFFERENT if found.differences else 0


def _listeners(quiet: bool, pictures: Path | None) -> list:
    from internlm2.agent import Renderer
    from internlm2.agent.record.pictures import PictureSaver

    listeners = [] if quiet else [Renderer()]
    return listeners if pictures is None else [*listeners, PictureSaver(pictures)]


def _limits(flags: ToolFlags) -> "Limits":
    from internlm2.agent import Limits

    own = Limits()
    return Limits(
        turns=own.turns if flags.max_turns is None else flags.max_turns,
        seconds=own.seconds if flags.max_seconds is None else flags.max_seconds,
        tokens=flags.max_total_tokens,
        tool_seconds=own.tool_seconds if flags.tool_seconds is None else flags.tool_seconds,
    )


def _tools(flags: ToolFlags, stack: ExitStack) -> "list[Tool]":
    from internlm2.agent import FolderReader, McpServer, McpTools, PythonTool, calculator

    names = flags.tool
    if names is None:
        has_others = flags.files is not None or flags.mcp is not None
        names = ("python",) if flags.loop == "interpreter" else () if has_others else ("calculator", "python")
    found: list[Tool] = []
    if "calculator" in names:
        found.append(calculator())
    if "python" in names:
        found.append(stack.enter_context(PythonTool()).tool)
    if flags.files is not None:
        reader = FolderReader(flags.files)
        stack.callback(reader.close)
        found += reader.tools()
    for text in flags.mcp or ():
        found += stack.enter_context(McpTools(McpServer.parse(text))).tools
    return found


def _tell_isolation() -> None:
    from internlm2.sandbox import examine_isolation

    for line in examine_isolation().describe():
        if line.startswith(("NOT", "Namespaces")):
            print(f"Sandbox: {line}", file=sys.stderr)


def _model(name: str, endpoint: str | None, key_name: str | None, config: RunConfig) -> "Model":
    if endpoint is not None:
        return _endpoint(endpoint, name, key_name, config)
    if key_name is not None:
        raise RequestError("--api-key-env is for an endpoint. Give --endpoint as well.")
    from internlm2.agent import EngineModel

    llm = options.load_llm(name, config)
    return EngineModel(llm, options.sampling(config), adapter=options.adapter_name(config), name=name)


def _endpoint(url: str, name: str, key_name: str | None, config: RunConfig) -> "Model":
    from internlm2.agent import EndpointModel

    said = {one.name: getattr(config, one.name) for one in fields(config)}
    said = {key: value for key, value in said.items() if value != getattr(RunConfig(), key)}
    refused = [key for key in said if key not in _OF_ENDPOINTS]
    if refused:
        raise RequestError(
            f"--{refused[0].replace('_', '-')} is for models that run here; an endpoint decides it. Leave it out."
        )
    key = None if key_name is None else os.environ.get(key_name)
    if key_name is not None and not key:
        raise RequestError(f"The environment variable {key_name} is not set. Put the key of {url} into it.")
    return EndpointModel(url, name, api_key=key, options=said)
