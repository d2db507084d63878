"""Reads what the assistant says: text, plugin calls, code to run. The counterpart of format.py.

Control tokens decide, not their spelling: from ids, a call begins only at the real `<|action_start|>`.
Where only text is at hand (another server), `AssistantTextParser` finds the markers, also when they are
split over chunks. A call that cannot be read is kept as `InvalidCall` with all of its text.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Protocol

from internlm2.tokenizer.chat.message import CodeCall, PluginCall, json_text
from internlm2.tokenizer.special import ACTION_END, ACTION_START, IM_END, INTERPRETER, PLUGIN
from internlm2.tokenizer.stream import StopStrings, StreamDecoder

_MARKERS = (ACTION_START, ACTION_END, IM_END, INTERPRETER, PLUGIN)


@dataclass(frozen=True)
class InvalidCall:
    """A call that breaks the format. raw: its text as it came; reason: what is wrong with it."""

    raw: str
    reason: str


Call = PluginCall | CodeCall | InvalidCall


@dataclass(frozen=True)
class AssistantTurn:
    """Everything that one answer holds."""

    text: str
    calls: tuple[Call, ...]

    def to_message(self) -> dict[str, object]:
        """The answer as an OpenAI-style message that `apply_chat` takes back.

        Invalid calls go into the content as text, so that nothing is lost.
        """
        content = self.text + "".join(call.raw for call in self.calls if isinstance(call, InvalidCall))
        message: dict[str, object] = {"role": "assistant", "content": content}
        calls: list[dict[str, object]] = []
        for call in self.calls:
            if isinstance(call, PluginCall):
                function = {"name": call.name, "arguments": json_text(call.parameters)}
            elif isinstance(call, CodeCall):
                function = {
                    "name": "python",
                    "arguments": json.dumps({"code": call.code}, ensure_ascii=False),
                }
            else:
                continue
            calls.append({"id": f"call_{len(calls)}", "type": "function", "function": function})
        if calls:
            message["tool_calls"] = calls
        return message


class SpeaksIds(Protocol):
    """What the parser needs of a tokenizer."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Special tokens by name."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        ...

    def stream(self, *, skip_special: bool = False) -> StreamDecoder:
        """An incremental decoder."""
        ...


class _Machine:
    """The states shared by both parsers: in text, or inside a call."""

    def __init__(self) -> None:
        self.ended = False
        self._texts: list[str] = []
        self._calls: list[Call] = []
        self._raw: list[str] | None = None  # the call so far, as written
        self._kind: str | None = None
        self._payload: list[str] = []

    @property
    def turn(self) -> AssistantTurn:
        """What was read so far."""
        return AssistantTurn("".join(self._texts), tuple(self._calls))

    def text(self, text: str) -> str:
        """Take plain text; return what belongs to the answer's text."""
        if self.ended or not text:
            return ""
        if self._raw is None:
            self._texts.append(text)
            return text
        self._raw.append(text)
        self._payload.append(text)
        return ""

    def marker(self, name: str) -> str:
        """Take a control token; return text if it means nothing here."""
        if self.ended:
            return ""
        if name == ACTION_START:
            self._close("the next call began before <|action_end|>")
            self._raw, self._kind, self._payload = [name], None, []
            return ""
        if name == IM_END:
            self.end()
            return ""
        if self._raw is None:
            return self.text(name)
        self._raw.append(name)
        if name == ACTION_END:
            self._close(None)
        elif self._kind is None and not self._payload:
            self._kind = name
        else:
            self._payload.append(name)
        return ""

    def end(self) -> None:
        """The answer is over."""
        self._close("it was cut off before <|action_end|>")
        self.ended = True

    def _close(self, problem: str | None) -> None:
        if self._raw is None:
            return
        raw, payload = "".join(self._raw), "".join(self._payload)
        self._raw = None
        self._calls.append(InvalidCall(raw, problem) if problem else _read_call(self._kind, payload, raw))


class AssistantParser:
    """Parses an answer from its ids, as they come. `turn` holds what was read so far."""

    def __init__(self, tokenizer: SpeaksIds) -> None:
        self._markers = {i: name for name, i in tokenizer.special_tokens.items() if name in _MARKERS}
        self._stop_ids = tokenizer.stop_ids
        self._stream = tokenizer.stream()
        self._machine = _Machine()

    @property
    def turn(self) -> AssistantTurn:
        """What was read so far."""
        return self._machine.turn

    @property
    def ended(self) -> bool:
        """Whether the end of the answer was seen; ids after it are no part of it."""
        return self._machine.ended

    def push(self, ids: int | Iterable[int]) -> str:
        """Add ids; return the answer's new text, without calls."""
        shown: list[str] = []
        for i in map(index, [ids] if isinstance(ids, int) else ids):
            if self._machine.ended:
                break
            if i in self._stop_ids or i in self._markers:
                shown.append(self._flush())
                name = IM_END if i in self._stop_ids else self._markers[i]
                shown.append(self._machine.marker(name))
            else:
                shown.append(self._machine.text(self._stream.push(i)))
        return "".join(shown)

    def finish(self) -> str:
        """No more ids come: a call without its end becomes an InvalidCall."""
        text = self._flush()
        self._machine.end()
        return text

    def _flush(self) -> str:
        return self._machine.text(self._stream.finish())


class AssistantTextParser:
    """Parses an answer from text that spells its markers, in chunks of any size."""

    def __init__(self) -> None:
        self._machine = _Machine()
        self._markers = StopStrings(_MARKERS)

    @property
    def turn(self) -> AssistantTurn:
        """What was read so far."""
        return self._machine.turn

    def push(self, text: str) -> str:
        """Add text; return the answer's new text, without calls."""
        shown: list[str] = []
        while text:
            shown.append(self._machine.text(self._markers.push(text)))
            if self._markers.matched is None:
                break
            shown.append(self._machine.marker(self._markers.matched))
            text, self._markers = self._markers.rest, StopStrings(_MARKERS)
        return "".join(shown)

    def finish(self) -> str:
        """No more text comes: a call without its end becomes an InvalidCall."""
        text = self._machine.text(self._markers.finish())
        self._machine.end()
        return text


def _read_call(kind: str | None, payload: str, raw: str) -> Call:
    if kind == INTERPRETER:
        return CodeCall(_code(payload))
    if kind != PLUGIN:
        return InvalidCall(raw, f"{ACTION_START} must be followed by {PLUGIN} or {INTERPRETER}")
    try:
        body = json.loads(payload, parse_constant=_refuse)
        json.dumps(body, allow_nan=False)
    except (ValueError, RecursionError) as error:
        return InvalidCall(raw, f"its body is not JSON: {error}")
    parameters = body.get("parameters", body.get("arguments", {})) if isinstance(body, dict) else None
    if not isinstance(parameters, dict) or not isinstance(body.get("name"), str):
        return InvalidCall(raw, 'its body is not {"name": "...", "parameters": {...}}')
    return PluginCall(body["name"], parameters)


def _refuse(name: str) -> None:
    raise ValueError(f"it holds {name}")


def _code(payload: str) -> str:
    """The code in a fenced block; a missing fence is forgiven, because the meaning is clear."""
    code = payload.strip("\n")
    if code.startswith("```") and code.endswith("```") and "\n" in code:
        return code[code.index("\n") + 1 :].removesuffix("```").removesuffix("\n")
    return code


def parse_text(text: str | Sequence[str]) -> AssistantTurn:
    """Parse a whole answer that spells its markers."""
    parser = AssistantTextParser()
    for chunk in [text] if isinstance(text, str) else text:
        parser.push(chunk)
    parser.finish()
    return parser.turn
