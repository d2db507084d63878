"""Calls that must come: how a tool choice fixes the beginning of an answer, and the schema of what follows.

InternLM2 writes a call as `<|action_start|><|plugin|>`, a line break and {"name", "parameters"}. An answer that must be
a call begins with these tokens, and a grammar holds the rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from internlm2.errors import RequestError
from internlm2.tokenizer import Tokenizer
from internlm2.tokenizer.chat.call_schema import schema_of_calls
from internlm2.tokenizer.chat.message import INTERPRETER_CALLS, read_tools
from internlm2.tokenizer.special import ACTION_START, INTERPRETER, PLUGIN

INTERPRETER_TOOL = "code_interpreter"


@dataclass(frozen=True)
class ToolChoice:
    """Whether the model may call ("auto"), may not ("none"), or must: any tool ("required"), or the one of `name`."""

    kind: Literal["auto", "none", "required", "named"] = "auto"
    name: str | None = None


@dataclass(frozen=True)
class Opening:
    """How a call that must come begins. ids: its first tokens. json_schema: of the rest; None: code, which is free."""

    ids: tuple[int, ...]
    json_schema: Mapping[str, object] | None


def opening(tokenizer: Tokenizer, tools: Sequence[Mapping[str, object]], choice: ToolChoice) -> Opening:
    """The beginning of a call that `choice` asks for. Raises RequestError when there is no such tool."""
    toolset = read_tools(tools)
    plugins = [p for p in toolset.plugins if choice.name is None or p["name"] == choice.name]
    wants_code = choice.name is None or choice.name in INTERPRETER_CALLS or choice.name == INTERPRETER_TOOL
    if not plugins and toolset.has_interpreter and wants_code:
        return Opening(_ids(tokenizer, f"{ACTION_START}{INTERPRETER}\n```python\n"), None)
    if not plugins:
        known = ", ".join(repr(plugin["name"]) for plugin in toolset.plugins) or "none"
        what = "a call is required" if choice.name is None else f"the tool {choice.name!r} is to be called"
        raise RequestError(f"By tool_choice {what}, but the tools are: {known}. Add it to tools.")
    return Opening(_ids(tokenizer, f"{ACTION_START}{PLUGIN}\n"), schema_of_calls(plugins))


def _ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Markers that the vocabulary has as control tokens, the others spelled."""
    return tuple(tokenizer.encode(text, allow_special=True))
