"""A Python session for a model: cells share their variables, and each call returns text, a value and pictures."""

import base64
import binascii
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal, Self

from internlm2.sandbox.limits import Limits, SandboxError
from internlm2.sandbox.process import SandboxProcess
from internlm2.sandbox.program import pack_files

CellStatus = Literal["ok", "error", "timeout", "memory", "disk", "ended"]

SESSION_LIMITS = Limits(
    wall_seconds=30.0,
    cpu_seconds=600.0,
    memory_bytes=2 << 30,
    num_processes=32,
    file_bytes=64 << 20,
    disk_bytes=256 << 20,
)
_FOREVER_SECONDS = 1e9
_START_SECONDS = 20.0
_GRACE_SECONDS = 2.0
_PNG = b"\x89PNG\r\n\x1a\n"
_REASONS: dict[str, tuple[CellStatus, str]] = {
    "memory": ("memory", "The session held more than {0.memory_bytes:,} bytes of memory."),
    "disk": ("disk", "The session's files took more than {0.disk_bytes:,} bytes."),
    "garbled": ("ended", "The code wrote nonsense to the pipe that its answers come through."),
    "cpu": ("timeout", "The session used more than {0.cpu_seconds:g} s of processor time."),
}


@dataclass(frozen=True)
class Execution:
    """What one call of `Interpreter.execute` brought.

    status: "ok", "error" (an exception, see `traceback`), "timeout", "memory", "disk", or "ended" (by the code itself).
    output, errors: what was printed; output_cut: some of it was dropped at `Limits.output_bytes`.
    value: `repr` of a last expression, or None. traceback: the user's frames only; a sentence for a passed limit.
    pictures: matplotlib figures as PNG bytes. state_lost: the variables are gone and the next call starts anew.
    """

    status: CellStatus
    output: str
    errors: str
    value: str | None
    traceback: str
    pictures: tuple[bytes, ...]
    state_lost: bool
    output_cut: bool
    seconds: float


class Interpreter:
    """A session in a sandbox; use it in a `with` block, or call `close`. Not for several threads at once.

    limits: `wall_seconds` holds for each call, the others for the whole session. files: relative names and contents of
    files in the working folder at every start.
    Raises SandboxError when no sandbox can be built here.

    >>> with Interpreter() as python:
    ...     python.execute("x = 6").status, python.execute("x * 7").value
    ('ok', '42')
    """

    def __init__(
        self, *, limits: Limits = SESSION_LIMITS, files: Mapping[str, str | bytes] | None = None
    ) -> None:
        self._process: SandboxProcess | None = None
        self._limits = limits
        self._files = pack_files(files or {})
        self._without: Sequence[str] = ()
        self._number = 0

    def execute(self, code: str) -> Execution:
        """Run one cell. A call that is too long is interrupted (variables stay), then ended (`state_lost`).

        Raises SandboxError when the sandbox cannot be started.
        """
        started = time.monotonic()
        process = self._process or self._start()
        self._number += 1
        process.replies.clear()
        process.send({"code": code, "number": self._number})

        def answered() -> bool:
            return process.report is not None or any(r.get("number") == self._number for r in process.replies)

        late = not process.pump(self._limits.wall_seconds, until=answered) and process.report is None
        if late:
            process.interrupt()
            process.pump(_GRACE_SECONDS, until=answered)
        process.pump(0.0, until=lambda: False)  # what was printed before the answer is in the pipes by now
        reply = next((r for r in process.replies if r.get("number") == self._number), None)
        if reply is None:
            self.restart()
        return self._execution(process, reply, late=late, seconds=time.monotonic() - started)

    def _start(self) -> SandboxProcess:
        limits = replace(self._limits, wall_seconds=_FOREVER_SECONDS)
        request: dict[str, object] = {"files": self._files, "stdin": ""}
        process = SandboxProcess("session", limits, request=request, without=self._without)
        self._process = process
        process.send({"code": "", "number": 0})
        process.pump(_START_SECONDS, until=lambda: bool(process.replies) or process.report is not None)
        if not process.replies:
            told = process.report or {}
            reason = told.get("broken") or process.errors.take()[-2000:] or "it ended without a word"
            self.restart()
            raise SandboxError(
                f"The sandbox could not be built: {reason}. See `docs/sandbox.md`, what it needs."
            )
        return process

    def _execution(
        self, process: SandboxProcess, reply: dict[str, object] | None, *, late: bool, seconds: float
    ) -> Execution:
        cut = process.output.cut or process.errors.cut
        process.output.cut = process.errors.cut = False
        output, errors = process.output.take(), process.errors.take()
        if reply is None:
            status, sentence = self._why(process, late=late)
            sentence += " The session was ended; its variables and files are gone."
            return Execution(status, output, errors, None, sentence, (), True, cut, seconds)
        value, trace = reply.get("value"), str(reply.get("traceback", ""))
        status: CellStatus = "error" if "error" in reply else "ok"
        if late and status == "error":
            status = "timeout"
            trace += (
                f"It was interrupted after {self._limits.wall_seconds:g} s; the variables are still there."
            )
        pictures = _decode_pictures(reply.get("pictures"))
        shown = None if value is None else str(value)
        return Execution(status, output, errors, shown, trace, pictures, False, cut, seconds)

    def _why(self, process: SandboxProcess, *, late: bool) -> tuple[CellStatus, str]:
        reason = str((process.report or {}).get("reason", ""))
        if reason in _REASONS:
            status, sentence = _REASONS[reason]
            return status, sentence.format(self._limits)
        if late:
            return (
                "timeout",
                f"It ran longer than {self._limits.wall_seconds:g} s and did not heed the interrupt.",
            )
        return "ended", "The code ended its own process."

    def restart(self) -> None:
        """End the session's processes and forget its variables and files; the next `execute` starts anew."""
        process, self._process = self._process, None
        if process is not None:
            process.close()

    def close(self) -> None:
        """End the session. Safe to call twice."""
        self.restart()

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _decode_pictures(encoded: object) -> tuple[bytes, ...]:
    """PNG bytes; what is not PNG (the session's code can write anything to us) is left out."""
    pictures = []
    for text in encoded if isinstance(encoded, list) else []:
        try:
            data = base64.b64decode(str(text), validate=True)
        except (binascii.Error, ValueError):
            continue
        if data.startswith(_PNG):
            pictures.append(data)
    return tuple(pictures)
