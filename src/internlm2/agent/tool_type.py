"""What an agent may do: a tool has a name, words for the model, a JSON schema, and something that runs.

Results are text and pictures. A tool that fails raises `ToolError`, whose text the model reads; any other exception
is told to the model as well, with its type, and ends nothing.
"""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from internlm2.errors import InternLM2Error

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
Arguments = Mapping[str, object]
Schema = Mapping[str, object]


class ToolError(InternLM2Error):
    """A call that cannot be carried out; the model reads the text and may try again."""


class ToolDefinitionError(InternLM2Error):
    """A function or description that no tool can be made of."""


@dataclass(frozen=True)
class Picture:
    """An image that a tool made. media_type: such as "image/png". data: the bytes of the file."""

    media_type: str
    data: bytes


@dataclass(frozen=True)
class ToolResult:
    """What a call brought. is_error: whether `text` says why it failed."""

    text: str
    pictures: tuple[Picture, ...] = ()
    is_error: bool = False


@dataclass(frozen=True)
class Tool:
    """Something a model can call by name.

    description: what it does, for the model. parameters: JSON schema of an object. run: takes the arguments as JSON
    gives them, and returns the result or an awaitable of it; it checks them itself and raises `ToolError`.
    is_code: the arguments are {"code": ...}, a program to run. one_at_a_time: calls wait for each other.
    Raises ToolDefinitionError for a name that APIs do not take.

    >>> Tool("now", "The time.", {"type": "object"}, lambda arguments: ToolResult("12:00"))
    """

    name: str
    description: str
    parameters: Schema
    run: Callable[[Arguments], ToolResult | Awaitable[ToolResult]]
    is_code: bool = False
    one_at_a_time: bool = False

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ToolDefinitionError(
                f"A tool is named {self.name!r}. A name is 1 to 64 of the letters a to z, digits, '_' and '-', and "
                "begins with a letter or '_'."
            )

    @property
    def function(self) -> dict[str, object]:
        """The tool as OpenAI's API describes functions."""
        return {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}


def check_names(tools: Sequence[Tool]) -> dict[str, Tool]:
    """The tools by name. Raises ToolDefinitionError when two have the same."""
    by_name: dict[str, Tool] = {}
    for tool in tools:
        if tool.name in by_name:
            raise ToolDefinitionError(
                f"Two tools are named {tool.name!r}. Give one another name, or a server another prefix."
            )
        by_name[tool.name] = tool
    return by_name
