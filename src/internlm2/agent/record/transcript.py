"""Transcripts: one JSON object a line, each written whole and at once, so that a killed run can be read to its end."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from internlm2 import files
from internlm2.agent.record.events import VERSION, Event, TranscriptError
from internlm2.agent.tool_type import Arguments, Tool, ToolError, ToolResult
from internlm2.config import suggest

MAX_BYTES = 1 << 30


class TranscriptWriter:
    """Writes events to a new file as they come; it is a listener of a session.

    Raises ExportError when the file exists or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        with files.writing(path):
            files.check_new(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor: int | None = os.open(
                path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600
            )
        self._path = path

    def __call__(self, event: Event) -> None:
        """Write one event."""
        # Lone surrogates, which UTF-8 cannot hold, become JSON's own escapes.
        line = json.dumps(event, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with files.writing(self._path):
            while line and self._descriptor is not None:
                line = line[os.write(self._descriptor, line) :]

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Transcript:
    """A run that was written down. start: its first event. events: the others. is_whole: whether no line is torn."""

    start: Event
    events: Sequence[Event]
    is_whole: bool

    @classmethod
    def load(cls, path: Path) -> "Transcript":
        """Read a transcript; a torn last line, of a run that was killed, is left out. Raises TranscriptError."""
        try:
            if path.stat().st_size > MAX_BYTES:
                raise TranscriptError(f"{path} is larger than {MAX_BYTES >> 30} GiB; no transcript is.")
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise TranscriptError(f"Cannot read the transcript {path}: {error.strerror or error}.") from error
        last = lines.pop()  # nothing, or what was being written when the run was killed
        found: list[dict[str, object]] = []
        for n, line in enumerate(lines):
            try:
                event = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TranscriptError(
                    f"{path}, line {n + 1}, is no JSON: {error}. Is it a transcript?"
                ) from error
            if not isinstance(event, dict) or not isinstance(event.get("event"), str):
                raise TranscriptError(f'{path}, line {n + 1}, has no "event". Is it a transcript?')
            found.append(event)
        if not found or found[0]["event"] != "start":
            raise TranscriptError(f"{path} does not begin with a start. Is it a transcript?")
        if found[0].get("version") != VERSION:
            raise TranscriptError(
                f"{path} has version {found[0].get('version')!r}; this program reads {VERSION}. "
                "Use the version of internlm2 that wrote it."
            )
        return cls(found[0], found[1:], is_whole=not last)

    def of(self, kind: str) -> list[Event]:
        """The events of a kind, in order."""
        return [event for event in self.events if event["event"] == kind]

    def tools(self) -> list[Tool]:
        """The tools as they were described; they cannot be run. Raises TranscriptError."""
        described = self.start.get("tools")
        found = []
        for each in described if isinstance(described, list) else []:
            if not isinstance(each, dict) or not isinstance(each.get("parameters"), dict):
                raise TranscriptError(f"A tool in the transcript is damaged: {each!r:.80}.")
            found.append(
                Tool(
                    str(each.get("name")),
                    str(each.get("description")),
                    each["parameters"],
                    _cannot_run,
                    is_code=each.get("is_code") is True,
                )
            )
        return found

    def text(self, key: str) -> str:
        """A text of the first line. Raises TranscriptError."""
        value = self.start.get(key)
        if not isinstance(value, str):
            raise TranscriptError(
                f"The transcript's {key} is {value!r:.60}. {suggest(key, list(self.start))}"
            )
        return value


def _cannot_run(_: Arguments) -> ToolResult:
    raise ToolError("This tool is only known from a transcript.")
