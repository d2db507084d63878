"""Reads what the assistant says: text, plugin calls, code to run. The counterpart of format.py.

Control tokens decide, not their spelling: from ids, a call begins only at the real `<|action_start|>`.
Where only text is at hand (another server), or the vocabulary lacks a marker, its spelling counts; it is
found also when it is split over chunks. A call that cannot be read is kept as `InvalidCall` with its text.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Protocol

from internlm2.tokenizer.chat.message import CodeCall, PluginCall, json_text
from internlm2.tokenizer.chat.spelled import spelled_markers
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
    """The states shared by both parsers: in text, or inside a call. kind: the marker that a call began with."""

    def __init__(self) -> None:
        self.ended = False
        self.kind: str | None = None
        self._texts: list[str] = []
        self._calls: list[Call] = []
        self._new: list[str | Call] = []
        self._raw: list[str] | None = None  # the call so far, as written
        self._payload: list[str] = []

    @property
    def turn(self) -> AssistantTurn:
        """What was read so far."""
        return AssistantTurn("".join(self._texts), tuple(self._calls))

    @property
    def is_in_call(self) -> bool:
        """Whether a call is open."""
        return self._raw is not None

    def drain(self) -> list[str | Call]:
        """Texts and calls that are new, in order."""
        new, self._new = self._new, []
        return new

    def text(self, text: str) -> None:
        """Take plain text."""
        if self.ended or not text:
            return
        if self._raw is None:
            self._texts.append(text)
            self._new.append(text)
        else:
            self._raw.append(text)
            self._payload.append(text)

    def marker(self, name: str) -> None:
        """Take a marker; where it means nothing it is text."""
        if self.ended:
            return
        if name == ACTION_START:
            self._close("the next call began before <|action_end|>")
            self._raw, self._payload = [name], []
        elif name == IM_END:
            self.end()
        elif self._raw is None:
            self.text(name)
        else:
            self._raw.append(name)
            if name == ACTION_END:
                self._close(None)
            elif self.kind is None and not self._payload:
                self.kind = name
            else:
                self._payload.append(name)

    def drop_payload(self) -> str:
        """Forget what stands behind the markers of the open call, and return it."""
        dropped, self._payload = "".join(self._payload), []
        if self._raw is not None:
            self._raw = ["".join(self._raw).removesuffix(dropped)]
        return dropped

    def end(self) -> None:
        """The answer is over."""
        self._close("it was cut off before <|action_end|>")
        self.ended = True

    def _close(self, problem: str | None) -> None:
        if self._raw is None:
            return
        raw, payload = "".join(self._raw), "".join(self._payload)
        call = InvalidCall(raw, problem) if problem else _read_call(self.kind, payload, raw)
        self._raw = self.kind = None
        self._calls.append(call)
        self._new.append(call)


class AssistantTextParser:
    """Parses an answer from text that spells its markers, in chunks of any size."""

    def __init__(self, markers: Collection[str] = _MARKERS) -> None:
        """markers: those that are looked for."""
        self._machine = _Machine()
        self._names = tuple(markers)
        self._markers = StopStrings(self._names)

    @property
    def turn(self) -> AssistantTurn:
        """What was read so far."""
        return self._machine.turn

    @property
    def ended(self) -> bool:
        """Whether the end of the answer was seen."""
        return self._machine.ended

    @property
    def kind(self) -> str | None:
        """The marker behind `<|action_start|>` while a call is open."""
        return self._machine.kind

    @property
    def is_in_call(self) -> bool:
        """Whether a call is open."""
        return self._machine.is_in_call

    @property
    def is_holding(self) -> bool:
        """Whether text is held back that may become a marker."""
        return self._markers.is_holding

    def push(self, text: str) -> str:
        """Add text; return the answer's new text, without calls."""
        return _texts(self.read(text))

    def read(self, text: str, *, is_payload: bool = False) -> list[str | Call]:
        """Add text; return new texts and calls in order. is_payload: no marker is looked for in it."""
        if is_payload:
            self._machine.text(self._markers.finish() + text)
            return self._machine.drain()
        while text:
            self._machine.text(self._markers.push(text))
            if self._markers.matched is None:
                break
            self._machine.marker(self._markers.matched)
            text, self._markers = self._markers.rest, StopStrings(self._names)
        return self._machine.drain()

    def read_marker(self, name: str) -> list[str | Call]:
        """Add a marker that is certain."""
        self._machine.text(self._markers.finish())
        self._machine.marker(name)
        return self._machine.drain()

    def drop_payload(self) -> str:
        """Forget what stands behind the markers of the open call, and return it."""
        self._machine.text(self._markers.finish())
        return self._machine.drop_payload()

    def finish(self) -> str:
        """No more text comes: a call without its end becomes an InvalidCall."""
        return _texts(self.read_rest())

    def read_rest(self) -> list[str | Call]:
        """As `finish`; returns new texts and calls in order."""
        self._machine.text(self._markers.finish())
        self._machine.end()
        return self._machine.drain()


class AssistantParser:
    """Parses an answer from its ids, as they come. `turn` holds what was read so far."""

    def __init__(self, tokenizer: SpeaksIds) -> None:
        self._markers = {i: name for name, i in tokenizer.special_tokens.items() if name in _MARKERS}
        self._stop_ids = tokenizer.stop_ids
        self._stream = tokenizer.stream()
        self._text = AssistantTextParser(spelled_markers(tokenizer.special_tokens))

    @property
    def turn(self) -> AssistantTurn:
        """What was read so far."""
        return self._text.turn

    @property
    def ended(self) -> bool:
        """Whether the end of the answer was seen; ids after it are no part of it."""
        return self._text.ended

    @property
    def kind(self) -> str | None:
        """The marker behind `<|action_start|>` while a call is open."""
        return self._text.kind

    @property
    def is_in_call(self) -> bool:
        """Whether a call is open."""
        return self._text.is_in_call

    @property
    def is_holding(self) -> bool:
        """Whether text is held back that may become a spelled marker."""
        return self._text.is_holding

    def push(self, ids: int | Iterable[int]) -> str:
        """Add ids; return the answer's new text, without calls."""
        return _texts(self.read(ids))

    def read(self, ids: int | Iterable[int], *, is_payload: bool = False) -> list[str | Call]:
        """Add ids; return new texts and calls in order. is_payload: markers that they spell are text."""
        new: list[str | Call] = []
        for i in map(index, [ids] if isinstance(ids, int) else ids):
            if self.ended:
                break
            if i in self._stop_ids or i in self._markers:
                new += self.read_marker(IM_END if i in self._stop_ids else self._markers[i])
            else:
                new += self._text.read(self._stream.push(i), is_payload=is_payload)
        return new

    def read_marker(self, name: str) -> list[str | Call]:
        """Add a marker by its name."""
        return self._text.read(self._stream.finish()) + self._text.read_marker(name)

    def drop_payload(self) -> str:
        """Forget what stands behind the markers of the open call, and return it."""
        self._stream.finish()
        return self._text.drop_payload()

    def finish(self) -> str:
        """No more ids come: a call without its end becomes an InvalidCall."""
        return _texts(self.read_rest())

    def read_rest(self) -> list[str | Call]:
        """As `finish`; returns new texts and calls in order."""
        return self._text.read(self._stream.finish()) + self._text.read_rest()


def _texts(new: Iterable[str | Call]) -> str:
    return "".join(each for each in new if isinstance(each, str))


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
