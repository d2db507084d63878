"""Reads OpenAI-style messages and tools strictly: a field that would be lost is an error.

Formats: the chat completions API for what comes in, InternLM's chat/chat_format.md for what the model
knows: roles system, user, assistant, environment; tools are plugins or the code interpreter.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from internlm2.errors import ChatError

Message = Mapping[str, object]
Tool = Mapping[str, object]

PLUGIN_NAME, INTERPRETER_NAME = "plugin", "interpreter"
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "environment": "environment",
    "tool": "environment",
    "function": "environment",
}
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "loss")
# How a call of the code interpreter is named where tools are called by name.
INTERPRETER_CALLS = frozenset({"python", "code_interpreter", "interpreter"})
_NAME = re.compile(r"[\w.-]{1,64}")


@dataclass(frozen=True)
class PluginCall:
    """A tool that the assistant calls, with its JSON parameters."""

    name: str
    parameters: dict[str, object]


@dataclass(frozen=True)
class CodeCall:
    """Python code that the assistant wants to run."""

    code: str


def json_text(value: object) -> str:
    """Parameters of a call as JSON text that UTF-8 can hold: half characters stay escaped."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


@dataclass(frozen=True)
class Turn:
    """One message as the model sees it. name: what stands behind `name=` in the header."""

    role: str
    name: str | None
    content: str
    calls: tuple[PluginCall | CodeCall, ...]
    has_loss: bool


@dataclass(frozen=True)
class ToolSet:
    """The tools of a conversation: descriptions of plugins, and whether code may be run."""

    plugins: tuple[Mapping[str, object], ...]
    has_interpreter: bool


def read_tools(tools: Sequence[Tool] | None) -> ToolSet:
    """Take OpenAI-style tools, bare function dicts and {"type": "code_interpreter"}. Raises ChatError."""
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence | None):
        raise ChatError(f"tools must be a list of dicts, but is {type(tools).__name__}.")
    plugins: list[Mapping[str, object]] = []
    has_interpreter = False
    for n, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping):
            raise ChatError(f"tools[{n}] must be a dict, but is {tool!r:.80}.")
        kind = tool.get("type")
        if kind == "code_interpreter":
            has_interpreter = True
            continue
        function = tool.get("function") if kind == "function" else tool
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ChatError(
                f"tools[{n}] must be a function with a name, or {{'type': 'code_interpreter'}}, "
                f"but is {dict(tool)!r:.120}."
            )
        plugins.append(function)
    return ToolSet(tuple(plugins), has_interpreter)


def read_messages(messages: Sequence[Message], *, has_interpreter: bool) -> list[Turn]:
    """Check every message and bring it into the model's terms. Raises ChatError naming the message."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ChatError(f"messages must be a list of dicts with role and content, but is {messages!r:.80}.")
    if not messages:
        raise ChatError(
            "There are no messages. Give at least one, such as {'role': 'user', 'content': 'Hello'}."
        )
    kinds_of_calls: dict[str, str] = {}
    has_interpreter = has_interpreter or any(
        isinstance(message, Mapping)
        and (message.get("role"), message.get("name")) == ("system", INTERPRETER_NAME)
        for message in messages
    )
    return [
        _read_message(message, f"messages[{n}]", kinds_of_calls, has_interpreter)
        for n, message in enumerate(messages)
    ]


def _read_message(
    message: Message, where: str, kinds_of_calls: dict[str, str], has_interpreter: bool
) -> Turn:
    if not isinstance(message, Mapping):
        raise ChatError(f"{where} must be a dict with role and content, but is {message!r:.80}.")
    for key, value in message.items():
        if (
            key not in _KEYS and value is not None
        ):  # the openai client writes fields that it does not use as None
            raise ChatError(f"{where} has the unknown field {key!r}. Known: {', '.join(_KEYS)}.")
    given = message.get("role")
    if not isinstance(given, str) or given not in _ROLES:
        raise ChatError(f"{where} has the role {given!r}. Known: {', '.join(_ROLES)}.")
    role = _ROLES[given]
    calls = _read_calls(message, where, kinds_of_calls, has_interpreter)
    if calls and role != "assistant":
        raise ChatError(f"{where} has tool_calls, but its role is {given!r}. Only the assistant calls tools.")
    loss = message.get("loss")
    if loss is not None and not isinstance(loss, bool):
        raise ChatError(f"{where} has loss {loss!r}; it must be True or False.")
    if loss and role != "assistant":
        raise ChatError(
            f"{where} has loss True, but its role is {given!r}. Only the assistant's words are learned."
        )
    return Turn(
        role=role,
        name=_header_name(message, given, where, kinds_of_calls, has_interpreter),
        content=_read_content(message.get("content"), where, may_be_absent=bool(calls)),
        calls=calls,
        has_loss=role == "assistant" if loss is None else loss,
    )


def _header_name(
    message: Message, role: str, where: str, kinds_of_calls: Mapping[str, str], has_interpreter: bool
) -> str | None:
    name = message.get("name")
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ChatError(f"{where} has the name {name!r}. A name is 1 to 64 letters, digits, '_', '-' or '.'.")
    if role == "environment":
        if name not in (None, PLUGIN_NAME, INTERPRETER_NAME):
            raise ChatError(
                f"{where} has the name {name!r}. A result comes from 'plugin' or 'interpreter'; "
                "for the name of a function use the role 'tool'."
            )
        return name
    if role in ("tool", "function"):
        call_id = message.get("tool_call_id")
        if isinstance(call_id, str) and call_id in kinds_of_calls:
            return kinds_of_calls[call_id]
        is_code = name == INTERPRETER_NAME or (has_interpreter and name in INTERPRETER_CALLS)
        return INTERPRETER_NAME if is_code else PLUGIN_NAME
    return name


def _read_content(content: object, where: str, *, may_be_absent: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        if may_be_absent:
            return ""
        raise ChatError(f"{where} has no content. Give a text; '' is allowed.")
    if not isinstance(content, Sequence):
        raise ChatError(
            f"{where} has content of type {type(content).__name__}; it must be a text or text parts."
        )
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise ChatError(
                f"{where} has the content part {part!r:.120}. This model reads text only: "
                "{'type': 'text', 'text': '...'}."
            )
        texts.append(text)
    return "".join(texts)


def _read_calls(
    message: Message, where: str, kinds_of_calls: dict[str, str], has_interpreter: bool
) -> tuple[PluginCall | CodeCall, ...]:
    given = message.get("tool_calls")
    if given is None:
        return ()
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise ChatError(f"{where} has tool_calls of type {type(given).__name__}; it must be a list.")
    calls: list[PluginCall | CodeCall] = []
    for n, call in enumerate(given):
        read = _read_call(call, f"{where} tool_calls[{n}]", has_interpreter)
        calls.append(read)
        if isinstance(call, Mapping) and isinstance(call.get("id"), str):
            kinds_of_calls[str(call["id"])] = INTERPRETER_NAME if isinstance(read, CodeCall) else PLUGIN_NAME
    return tuple(calls)


def _read_call(call: object, where: str, has_interpreter: bool) -> PluginCall | CodeCall:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise ChatError(f"{where} must hold a function with a name and arguments, but is {call!r:.120}.")
    arguments = function.get("arguments", function.get("parameters", {}))
    if has_interpreter and name in INTERPRETER_CALLS:
        return CodeCall(_read_code(arguments, where))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ChatError(
                f"{where}: the arguments of {name!r} are not JSON ({error}): {arguments!r:.120}."
            ) from error
    if not isinstance(arguments, Mapping):
        raise ChatError(
            f"{where}: the arguments of {name!r} must be a JSON object, but are {arguments!r:.120}."
        )
    return PluginCall(name, dict(arguments))


def _read_code(arguments: object, where: str) -> str:
    if isinstance(arguments, str):
        try:
            decoded = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments  # the code itself
        arguments = decoded if isinstance(decoded, Mapping) else {"code": arguments}
    code = arguments.get("code") if isinstance(arguments, Mapping) else None
    if not isinstance(code, str):
        raise ChatError(
            f"{where}: a call of the interpreter needs its code as {{'code': '...'}}, not {arguments!r:.120}."
        )
    return code
