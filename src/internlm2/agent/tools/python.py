"""Python as a tool: code of the model in a sandbox, with variables that live on, text and pictures back."""

from dataclasses import replace
from types import TracebackType
from typing import Annotated, Self

from internlm2.agent.dialects.fence import strip_fence
from internlm2.agent.function.define import tool
from internlm2.agent.tool_type import Picture, Tool, ToolResult
from internlm2.sandbox import Execution, Interpreter, Limits
from internlm2.sandbox.interpreter import SESSION_LIMITS


class PythonTool:
    """A Python session; use it in a `with` block, or call `close`. tool: what an agent takes.

    The first call that needs a sandbox fails where none can be built.

    >>> with PythonTool() as python:
    ...     Agent(model, [python.tool]).run("How many primes are below 1000?")
    """

    def __init__(self, *, limits: Limits = SESSION_LIMITS) -> None:
        self._interpreter = Interpreter(limits=limits)

        @tool(one_at_a_time=True)
        def python(
            code: Annotated[str, "the program; the value of a last expression is shown"],
        ) -> ToolResult:
            """Run Python code. Variables live on between calls. Returns what was printed and the last value."""
            return as_result(self._interpreter.execute(strip_fence(code)))

        self.tool: Tool = replace(python, is_code=True)

    def close(self) -> None:
        """End the session. Safe to call twice."""
        self._interpreter.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def as_result(execution: Execution) -> ToolResult:
    """What a cell brought: printed text, then the value, then what went wrong."""
    parts = [execution.output, execution.errors, execution.value or "", execution.traceback]
    if execution.output_cut:
        parts.append("[some output was dropped: there was too much]")
    if execution.state_lost:
        parts.append("[the session begins anew; its variables are gone]")
    text = "\n".join(part.rstrip("\n") for part in parts if part.strip())
    pictures = tuple(Picture("image/png", data) for data in execution.pictures)
    return ToolResult(text, pictures, is_error=execution.status != "ok")
