"""A run in the terminal, as it goes: what the model thinks, which tools it calls, what they bring."""

import json
import sys
from collections.abc import Mapping
from typing import TextIO

from internlm2.agent.record.events import Event
from internlm2.agent.text import clean, shorten

_SHOWN_CHARS = 2000
_COLOURS = {"question": "1", "reply": "0", "call": "36", "ok": "32", "error": "31", "note": "2"}


class Renderer:
    """Prints events; it is a listener of a session. colour: None: where the stream is a terminal."""

    def __init__(self, stream: TextIO | None = None, *, colour: bool | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._colour = self._stream.isatty() if colour is None else colour

    def __call__(self, event: Event) -> None:
        """Print one event."""
        kind = event["event"]
        if kind == "question":
            self._print("question", "Question", event["text"])
        elif kind == "reply":
            self._reply(event)
        elif kind == "result":
            self._result(event)
        elif kind == "end":
            counts = (
                f"{event['turns']} turns, {event['calls']} calls, {event['output_tokens']} tokens written"
            )
            words = f"[{event['ending']}; {counts}; {event['seconds']} s]"
            self._print("note", "", words)

    def _reply(self, event: Event) -> None:
        calls = event["calls"]
        self._print("reply", f"Model, turn {event['turn']}", event["text"])
        for call in calls if isinstance(calls, list) else []:
            self._print("call", f"Call {call['name']}", _arguments(call))
        problems = event["problems"]
        for problem in problems if isinstance(problems, list) else []:
            self._print("error", "Unreadable call", problem)

    def _result(self, event: Event) -> None:
        is_ok = event["status"] == "ok"
        pictures = event["pictures"]
        head = f"Result of {event['name']}" if is_ok else f"{event['name']}: {event['status']}"
        text = str(event["text"])
        if isinstance(pictures, list) and pictures:
            text += f"\n[{len(pictures)} pictures]"
        self._print("ok" if is_ok else "error", head, text)

    def _print(self, kind: str, head: str, text: object) -> None:
        shown = shorten(clean(str(text)), _SHOWN_CHARS).strip("\n")
        if not shown and kind == "reply":
            return
        head = clean(head).replace("\n", " ")
        if self._colour:
            head = f"\x1b[{_COLOURS[kind]};1m{head}\x1b[0m" if head else ""
        indented = shown.replace("\n", "\n  ")
        print(f"{head}\n  {indented}" if head else shown, file=self._stream, flush=True)


def _arguments(call: Mapping[str, object]) -> str:
    """Arguments for people: code as it is, the rest as JSON."""
    text = str(call["arguments"])
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(found, dict) and list(found) == ["code"]:
        return str(found["code"])
    return json.dumps(found, ensure_ascii=False)
