"""Which way of speaking an agent takes."""

from collections.abc import Sequence
from typing import Literal, get_args

from internlm2.agent.dialects.dialect import Dialect
from internlm2.agent.dialects.fence import FenceDialect
from internlm2.agent.dialects.native import NativeDialect
from internlm2.agent.dialects.react import ReactDialect
from internlm2.agent.model import Model
from internlm2.agent.tool_type import Tool
from internlm2.errors import RequestError

DialectName = Literal["auto", "native", "react", "interpreter"]


def choose(name: DialectName, model: Model, tools: Sequence[Tool]) -> Dialect:
    """The dialect for a model. Raises RequestError where model or tools do not fit it."""
    if name not in get_args(DialectName):
        raise RequestError(f"The loop is {name!r}, but must be one of {', '.join(get_args(DialectName))}.")
    if name == "interpreter":
        if len(tools) != 1 or not tools[0].is_code:
            given = ", ".join(tool.name for tool in tools) or "none"
            raise RequestError(
                f"The interpreter loop has one tool, which runs code, but the tools are: {given}. "
                "Give the Python tool alone, or use another loop."
            )
        return NativeDialect("interpreter") if model.calls_tools else FenceDialect()
    if name == "native" and tools and not model.calls_tools:
        raise RequestError(
            f"{model.name} has no tokens for calls, so it cannot do the native loop. Use the react loop."
        )
    return NativeDialect() if name == "native" or (name == "auto" and model.calls_tools) else ReactDialect()
