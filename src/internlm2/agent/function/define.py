"""`@tool`: the name, words and schema of a function, read off its signature and docstring."""

import asyncio
import dataclasses
import enum
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import overload

import docstring_parser

from internlm2.agent.function.kinds import (
    Field,
    Kind,
    described,
    hints_of,
    kind_of,
    object_schema,
    read_object,
    with_default,
)
from internlm2.agent.tool_type import Arguments, Picture, Tool, ToolDefinitionError, ToolResult

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@overload
def tool(function: Callable[..., object]) -> Tool: ...
@overload
def tool(
    *, name: str | None = None, description: str | None = None, one_at_a_time: bool = False
) -> Callable[[Callable[..., object]], Tool]: ...
def tool(
    function: Callable[..., object] | None = None,
    *,
    name: str | None = None,
    description: str | None = None,
    one_at_a_time: bool = False,
) -> Tool | Callable[[Callable[..., object]], Tool]:
    """Make a tool of a function; with or without brackets, as a decorator or a call.

    Every argument has to be annotated. What the model reads of an argument is `Annotated[int, "how many"]`, or its line
    in the docstring (Google, NumPy, reST). name, description: instead of the function's own. An `async def` works too.
    The function may return text, a `ToolResult`, a `Picture`, or anything that JSON can write.
    Raises ToolDefinitionError for types that JSON has no form of.

    >>> @tool
    ... def add(a: int, b: int = 1) -> int:
    ...     '''Add two numbers.'''
    ...     return a + b
    >>> add.parameters["required"]
    ['a']
    """
    if function is None:
        return partial(_make, name=name, description=description, one_at_a_time=one_at_a_time)
    return _make(function, name=name, description=description, one_at_a_time=one_at_a_time)


def _make(
    function: Callable[..., object], *, name: str | None, description: str | None, one_at_a_time: bool
) -> Tool:
    own_name = name or (function.__name__ if inspect.isroutine(function) else "")
    if not own_name:
        raise ToolDefinitionError(f"{function!r} has no name of its own. Give one: tool(name=...).")
    written, bound = _written(function)
    if inspect.isgeneratorfunction(written) or inspect.isasyncgenfunction(written):
        raise ToolDefinitionError(
            f"{own_name} yields its results one by one. A tool returns all at once, such as a list."
        )
    fields, rest = _fields(function, own_name, written, bound)
    spoken = docstring_parser.parse(inspect.getdoc(written) or "")
    words = [part.strip() for part in (spoken.short_description, spoken.long_description) if part]

    def run(arguments: Arguments) -> ToolResult | Awaitable[ToolResult]:
        found = function(**read_object(arguments, "", fields, rest))
        return _awaited(found) if inspect.isawaitable(found) else as_result(found)

    return Tool(
        own_name,
        description if description is not None else "\n\n".join(words),
        object_schema(fields, rest),
        run,
        one_at_a_time=one_at_a_time,
    )


def _written(function: Callable[..., object]) -> tuple[Callable[..., object], set[str]]:
    """The function whose annotations count, and the arguments that `partial` has bound by name: no model sees those."""
    bound: set[str] = set()
    while isinstance(function, partial):
        bound |= set(function.keywords)
        function = function.func
    if inspect.isroutine(function) or isinstance(function, type):
        return function, bound
    return type(function).__call__, bound


def _fields(
    function: Callable[..., object], name: str, written: Callable[..., object], bound: set[str]
) -> tuple[list[Field], Kind | None]:
    """The arguments of a function, and the kind of `**others` if it takes some."""
    hints = hints_of(written, name)
    spoken = docstring_parser.parse(inspect.getdoc(written) or "")
    words = {each.arg_name: each.description for each in spoken.params if each.description}
    fields: list[Field] = []
    rest: Kind | None = None
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in bound:
            continue
        where = f"{name}({parameter.name})"
        if parameter.name not in hints:
            raise ToolDefinitionError(f"{where} has no type. Annotate it, such as {parameter.name}: str.")
        kind = kind_of(hints[parameter.name], where)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            rest = kind
            continue
        if parameter.kind not in _NAMED:
            raise ToolDefinitionError(f"{where} has no name in a call. Tools are called by names only.")
        if "description" not in kind.schema and parameter.name in words:
            kind = described(kind, [words[parameter.name]])
        has_default = parameter.default is not inspect.Parameter.empty
        if has_default:
            kind = with_default(kind, parameter.default)
        fields.append(Field(parameter.name, kind, not has_default))
    return fields, rest


async def _awaited(found: Awaitable[object]) -> ToolResult:
    return as_result(await found)


def as_result(value: object) -> ToolResult:
    """What a function returned, as text and pictures."""
    if isinstance(value, ToolResult):
        return value
    if isinstance(value, str):
        return ToolResult(value)
    if value is None:
        return ToolResult("")
    if isinstance(value, Picture):
        return ToolResult("", (value,))
    try:
        return ToolResult(json.dumps(value, ensure_ascii=False, default=_plain))
    except (TypeError, ValueError, RecursionError):
        return ToolResult(str(value))


def _plain(value: object) -> object:
    """JSON's form of what json does not know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, bytes | asyncio.Future):
        raise TypeError
    return str(value)
