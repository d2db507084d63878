"""Run one program that a model wrote, and its tests, and say how it ended.

The tests run in another process than the program; a program has passed when the tests' process sends back a random
number that was made for this run, which the program's process never sees. Exit codes prove nothing.
"""

import base64
import hmac
import secrets
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from internlm2.sandbox.limits import Limits, SandboxError
from internlm2.sandbox.process import SandboxProcess
from internlm2.sandbox.setup import Wall

Status = Literal["passed", "failed", "exited", "crashed", "timeout", "memory", "disk", "output"]

_START_SECONDS = 20.0
_SENTINEL_BYTES = 32
_REASONS: dict[str, tuple[Status, str]] = {
    "wall": ("timeout", "It ran longer than {0.wall_seconds:g} s."),
    "cpu": ("timeout", "It used more than {0.cpu_seconds:g} s of processor time."),
    "memory": ("memory", "Its processes held more than {0.memory_bytes:,} bytes of memory."),
    "disk": ("disk", "Its files took more than {0.disk_bytes:,} bytes."),
    "garbled": ("failed", "The tests wrote nonsense to the pipe that their verdict comes through."),
    "output": ("output", "It wrote more than {0.output_bytes:,} bytes of output."),
}


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    status: "passed" (the program ran, then all tests did), "failed" (an exception, of the program or of a test),
    "exited" (it left before the tests were done, whatever its exit code), "crashed" (a signal), or the limit passed.
    detail: a traceback or a sentence. output, errors: what it printed, cut at `Limits.output_bytes`.
    seconds: wall time with the start of the sandbox. wall: what was put up around it.
    """

    status: Status
    detail: str
    output: str
    errors: str
    seconds: float
    wall: Wall

    @property
    def passed(self) -> bool:
        """Whether the status is "passed"."""
        return self.status == "passed"


def run_program(
    code: str,
    *,
    tests: str = "",
    entry_points: Sequence[str] = (),
    limits: Limits | None = None,
    stdin: str = "",
    files: Mapping[str, str | bytes] | None = None,
) -> Outcome:
    """Run `code`, then `tests` against it, in a fresh sandbox. Safe to call from many threads at once.

    tests: Python text that uses the functions of `code` by name; it runs in another process, where a function of the
    program takes and gives plain data. Without tests, "passed" is only the program's own word that it reached its end.
    entry_points: names that the tests take from the program even when they are built-in names, such as "sum".
    stdin: its standard input. files: relative names and contents of files in its working folder.
    Raises SandboxError when no sandbox can be built here, or a file name leaves the folder.

    >>> run_program("def double(x): return 2 * x", tests="assert double(4) == 8").passed
    True
    """
    return run_without(
        (), code, tests=tests, entry_points=entry_points, limits=limits, stdin=stdin, files=files
    )


def run_without(
    protections: Sequence[str],
    code: str,
    *,
    tests: str = "",
    entry_points: Sequence[str] = (),
    limits: Limits | None = None,
    stdin: str = "",
    files: Mapping[str, str | bytes] | None = None,
) -> Outcome:
    """`run_program` with some protections left out: how tests prove that each of them is needed.

    protections: of "namespaces", "network", "files", "user", "limits", "filter".
    """
    limits = limits or Limits()
    started = time.monotonic()
    sentinel = secrets.token_hex(_SENTINEL_BYTES)
    request: dict[str, object] = {"code": code, "stdin": stdin, "files": pack_files(files or {})}
    process = SandboxProcess("program", limits, request=request, without=protections)
    try:
        # The tests' process reads this from the pipe; the program's process has closed it before any code runs.
        process.send({"tests": tests, "sentinel": sentinel, "entry_points": list(entry_points)})
        too_much = _pump(process, limits)
        status, detail = _judge(process, limits, sentinel, too_much=too_much)
    finally:
        process.close()
    told = (process.report or {}).get("wall")
    wall = Wall(**told) if isinstance(told, dict) else Wall()
    seconds = time.monotonic() - started
    return Outcome(status, detail, process.output.take(), process.errors.take(), seconds, wall)


def _pump(process: SandboxProcess, limits: Limits) -> bool:
    """Wait for the end; True when it was ended for its output."""

    def ended() -> bool:
        return process.report is not None or process.output.cut or process.errors.cut

    if not process.pump(limits.wall_seconds + _START_SECONDS, until=ended):
        return False
    if process.report is not None:
        process.pump(1.0, until=lambda: not process.is_open)  # the rest of the output
    return process.output.cut or process.errors.cut


def _judge(process: SandboxProcess, limits: Limits, sentinel: str, *, too_much: bool) -> tuple[Status, str]:
    if too_much:
        return _limit("output", limits)
    report = process.report
    if report is None or "broken" in report:
        reason = report["broken"] if report else process.errors.take()[-2000:] or "it ended without a word"
        raise SandboxError(f"The sandbox could not be built: {reason}. See `docs/sandbox.md`, what it needs.")
    if report["reason"]:
        return _limit(str(report["reason"]), limits)
    verdict = process.replies[-1] if process.replies else {}
    if hmac.compare_digest(str(verdict.get("sentinel", "")), sentinel):
        return "passed", ""
    if "kind" in verdict:
        kind, text = str(verdict["kind"]), str(verdict["text"])
        if kind == "SystemExit" and verdict["where"] == "code":
            return "exited", f"It called exit before the tests were done.\n{text}"
        return ("memory" if kind == "MemoryError" else "failed"), text
    return _ended(report["worker"], limits)


def _limit(reason: str, limits: Limits) -> tuple[Status, str]:
    status, sentence = _REASONS[reason]
    return status, sentence.format(limits)


def _ended(code: object, limits: Limits) -> tuple[Status, str]:
    if not isinstance(code, int) or code >= 0:
        return "exited", f"Its process ended before the tests were done (exit code {code})."
    if -code == signal.SIGXCPU:
        return _limit("cpu", limits)
    return "crashed", f"Its process was ended by {signal.Signals(-code).name} before the tests were done."


def pack_files(files: Mapping[str, str | bytes]) -> dict[str, str]:
    """Contents as base64. Raises SandboxError for a name that leaves the working folder."""
    packed = {}
    for name, content in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
            raise SandboxError(
                f"The file name {name!r} leaves the sandbox. Give a relative name such as 'data/a.csv'."
            )
        data = content.encode() if isinstance(content, str) else content
        packed[name] = base64.b64encode(data).decode("ascii")
    return packed
