"""What happens in a run, as plain JSON objects: a transcript is these, one a line, and a terminal shows the same.

Each event has `event` and `seconds` (since the session began) besides its own fields.
"""

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from internlm2.agent.calling import CallResult
from internlm2.agent.limits import Limits
from internlm2.agent.model import Reply, ToolCall
from internlm2.agent.tool_type import Picture, Tool
from internlm2.errors import InternLM2Error

VERSION = 1
Event = Mapping[str, object]
Listener = Callable[[Event], None]


class TranscriptError(InternLM2Error):
    """A transcript that cannot be read, or that no run can be made of."""


def start_event(
    *,
    model: str,
    calls_tools: bool,
    dialect: str,
    system: str | None,
    tools: Sequence[Tool],
    limits: Limits,
    constrain: bool,
) -> dict[str, object]:
    """The first line: all that decides how the run goes."""
    described = [{**tool.function, "is_code": tool.is_code} for tool in tools]
    return {
        "event": "start",
        "version": VERSION,
        "model": model,
        "calls_tools": calls_tools,
        "dialect": dialect,
        "system": system,
        "constrain": constrain,
        "tools": described,
        "limits": asdict(limits),
    }


def reply_event(turn: int, reply: Reply, seconds: float) -> dict[str, object]:
    """An answer of the model."""
    return {
        "event": "reply",
        "turn": turn,
        "text": reply.text,
        "calls": [asdict(call) for call in reply.calls],
        "problems": list(reply.problems),
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "output_tokens": reply.output_tokens,
        "took_seconds": round(seconds, 4),
    }


def result_event(turn: int, result: CallResult) -> dict[str, object]:
    """What became of a call."""
    pictures = [
        {"media_type": picture.media_type, "base64": base64.b64encode(picture.data).decode()}
        for picture in result.pictures
    ]
    return {
        "event": "result",
        "turn": turn,
        **asdict(result.call),
        "status": result.status,
        "text": result.text,
        "pictures": pictures,
        "took_seconds": round(result.seconds, 4),
    }


def reply_of(event: Event) -> Reply:
    """The answer that an event holds. Raises TranscriptError."""
    try:
        return Reply(
            _text(event, "text"),
            tuple(
                ToolCall(_text(call, "id"), _text(call, "name"), _text(call, "arguments"))
                for call in _objects(event, "calls")
            ),
            tuple(str(problem) for problem in _list(event, "problems")),
            "length" if event.get("finish_reason") == "length" else "stop",
            _count(event, "prompt_tokens"),
            _count(event, "output_tokens"),
        )
    except (KeyError, TypeError) as error:
        raise TranscriptError(f"A reply in the transcript is damaged: {error}.") from error


def result_of(event: Event) -> CallResult:
    """The result that an event holds. Raises TranscriptError."""
    status = event.get("status")
    try:
        if status not in ("ok", "error", "timeout", "refused"):
            raise TypeError(f"status is {status!r}")
        return CallResult(
            ToolCall(_text(event, "id"), _text(event, "name"), _text(event, "arguments")),
            status,
            _text(event, "text"),
            tuple(
                Picture(_text(each, "media_type"), base64.b64decode(_text(each, "base64"), validate=True))
                for each in _objects(event, "pictures")
            ),
        )
    except (KeyError, TypeError, binascii.Error) as error:
        raise TranscriptError(f"A result in the transcript is damaged: {error}.") from error


def _text(event: Mapping[str, object], key: str) -> str:
    value = event[key]
    if not isinstance(value, str):
        raise TypeError(f"{key} is {value!r:.60}")
    return value


def _count(event: Event, key: str) -> int:
    value = event[key]
    if not isinstance(value, int):
        raise TypeError(f"{key} is {value!r:.60}")
    return value


def _list(event: Event, key: str) -> list[object]:
    value = event[key]
    if not isinstance(value, list):
        raise TypeError(f"{key} is {value!r:.60}")
    return value


def _objects(event: Event, key: str) -> list[dict[str, object]]:
    values = _list(event, key)
    found = [value for value in values if isinstance(value, dict)]
    if len(found) != len(values):
        raise TypeError(f"{key} holds what is no object")
    return found
