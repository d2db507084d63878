"""Carrying out calls: arguments checked, several at once, each with its time; whatever goes wrong becomes words.

A call that is not answered in time is told as an error. An `async` tool is cancelled then; a plain function cannot be,
and goes on in its thread, where its result is dropped.
"""

import asyncio
import inspect
import json
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from internlm2.agent.background import BackgroundLoop, in_thread
from internlm2.agent.limits import Limits
from internlm2.agent.model import ToolCall
from internlm2.agent.text import break_markers, clean, shorten
from internlm2.agent.tool_type import Picture, Tool, ToolError, ToolResult, check_names
from internlm2.config import suggest

Status = Literal["ok", "error", "timeout", "refused"]
_MOST_TYPES = 200


@dataclass(frozen=True)
class CallResult:
    """What became of a call. text: what the model reads. seconds: how long it took."""

    call: ToolCall
    status: Status
    text: str
    pictures: tuple[Picture, ...] = ()
    seconds: float = field(default=0.0, compare=False)


class Executor(Protocol):
    """What carries out calls: tools, or a recording of them."""

    def run_all(
        self,
        calls: Sequence[ToolCall],
        *,
        deadline: float | None = None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> list[CallResult]:
        """The results, in order. deadline: `time.monotonic()` when nobody waits any more."""
        ...

    def close(self) -> None:
        """Nothing is asked any more."""
        ...


class ToolRunner:
    """Carries out calls of `tools`. breaks_markers: spellings of control tokens in results are broken up."""

    def __init__(self, tools: Sequence[Tool], limits: Limits, *, breaks_markers: bool = False) -> None:
        self._tools = check_names(tools)
        self._limits = limits
        self._breaks_markers = breaks_markers
        self._loop = BackgroundLoop("internlm2-tools")
        self._locks = {name: asyncio.Lock() for name, tool in self._tools.items() if tool.one_at_a_time}
        self._busy = {name: threading.Lock() for name in self._locks}

    def run_all(
        self,
        calls: Sequence[ToolCall],
        *,
        deadline: float | None = None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> list[CallResult]:
        """See `Executor.run_all`. Ctrl-C leaves at once."""
        return self._loop.run(self._all(calls, deadline), is_cancelled=is_cancelled)

    def close(self) -> None:
        """End the thread of the event loop."""
        self._loop.close()

    async def _all(self, calls: Sequence[ToolCall], deadline: float | None) -> list[CallResult]:
        places = asyncio.Semaphore(self._limits.parallel_calls)

        async def one(call: ToolCall) -> CallResult:
            async with places:
                return await self._one(call, deadline)

        return list(await asyncio.gather(*map(one, calls)))

    async def _one(self, call: ToolCall, deadline: float | None) -> CallResult:
        started = time.monotonic()
        left = self._limits.tool_seconds
        left = left if deadline is None else max(0.01, min(left, deadline - started))
        status: Status = "ok"
        try:
            tool = self._find(call.name)
            result = await self._bounded(tool, read_arguments(call.arguments), left)
            if not isinstance(result, ToolResult):
                raise ToolError(f"The tool returned {type(result).__name__} where a ToolResult is due.")
            status = "error" if result.is_error else "ok"
        except _LateError:
            status, result = "timeout", ToolResult(f"No result after {left:.3g} s; the call was given up.")
        except ToolError as error:
            status, result = "error", ToolResult(str(error))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            status, result = "error", ToolResult(_told(error))
        return self._result(call, status, result, time.monotonic() - started)

    def _find(self, name: str) -> Tool:
        tool = self._tools.get(name)
        if tool is None:
            known = list(self._tools)
            raise ToolError(
                f"There is no tool {name[:_MOST_TYPES]!r}. "
                + (suggest(name[:_MOST_TYPES], known) if known else "There are none.")
            )
        return tool

    async def _bounded(self, tool: Tool, arguments: Mapping[str, object], seconds: float) -> ToolResult:
        if not tool.one_at_a_time:
            return await _in_time(_call(tool, arguments), seconds)
        async with self._locks[tool.name]:
            busy = self._busy[tool.name]
            if not busy.acquire(blocking=False):
                raise ToolError(
                    f"{tool.name} is still at work on a call that was given up. Go on without it."
                )
            return await _in_time(_call(tool, arguments, busy.release), seconds)

    def _result(self, call: ToolCall, status: Status, result: ToolResult, seconds: float) -> CallResult:
        limits = self._limits
        text = clean(shorten(result.text, limits.result_chars))
        if self._breaks_markers:
            text = break_markers(text)
        kept = [p for p in result.pictures if len(p.data) <= limits.picture_bytes][: limits.pictures]
        if len(kept) < len(result.pictures):
            text += f"\n[{len(result.pictures) - len(kept)} pictures left out: too many or too large]"
        return CallResult(call, status, text, tuple(kept), seconds)


class _LateError(Exception):
    """A call's time is over; not TimeoutError, which a tool may raise itself."""


async def _in_time(work: Coroutine[object, object, ToolResult], seconds: float) -> ToolResult:
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait([task], timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not done:
        task.cancel()
        raise _LateError
    return task.result()


async def _call(
    tool: Tool, arguments: Mapping[str, object], finished: Callable[[], None] = lambda: None
) -> ToolResult:
    """Run a tool: its function in a thread, and what can be awaited here. finished: when its function is back."""

    def work() -> object:
        try:
            return tool.run(arguments)
        finally:
            finished()

    result = await in_thread(work)
    if inspect.isawaitable(result):
        try:
            result = await result
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise ToolError("The tool cancelled itself.") from error
        except (SystemExit, KeyboardInterrupt) as error:
            raise ToolError(f"{type(error).__name__}: {error}") from error
    return result  # type: ignore[return-value] # looked at where it arrives


def read_arguments(text: str) -> dict[str, object]:
    """The arguments of a call from their JSON text; nothing is no arguments. Raises ToolError."""
    if not text.strip():
        return {}
    try:
        found = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ToolError(
            f"The arguments are not JSON ({str(error)[:_MOST_TYPES]}). Give one JSON object."
        ) from None
    if not isinstance(found, dict):
        raise ToolError('The arguments must be one JSON object, such as {"name": "value"}.')
    return found


def _refuse(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


def _told(error: Exception) -> str:
    """An exception for the model: its type and words, no traceback, which would show our files."""
    try:
        words = str(error)
    except Exception:
        words = ""
    name = type(error).__name__
    return f"{name}: {words}" if words else name
