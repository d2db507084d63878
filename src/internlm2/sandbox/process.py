"""One sandbox as the host sees it: a child process, its pipes, its private folder, and their certain end.

Everything that comes out is read in bounded pieces; messages are JSON with a length limit, never pickle.
"""

import contextlib
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from internlm2.sandbox import wire
from internlm2.sandbox.limits import Limits, SandboxError
from internlm2.sandbox.setup import Setup

_READ_BYTES = 1 << 16
_END_SECONDS = 3.0
_FLOOD_SECONDS = 0.5  # how long output that never pauses is read after the time is over
_INTERRUPT = b"i"
_SYSTEM_PATHS = (
    "/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/usr/share", "/usr/local/bin",
    "/usr/local/lib", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/ld.so.conf",
    "/etc/alternatives", "/etc/localtime", "/etc/fonts", "/nix/store",
)  # fmt: skip
# The far side is started without running our own package's __init__ files: packages that have a path and nothing else.
_START = """
import sys
for name, path in (("internlm2", sys.argv[5]), ("internlm2.sandbox", sys.argv[5] + "/sandbox")):
    package = type(sys)(name)
    package.__path__ = [path]
    sys.modules[name] = package
from internlm2.sandbox.inside.launch import main
main()
"""


def readable_paths() -> list[str]:
    """What a program may read besides its own folder: the system's programs and libraries, and this Python."""
    paths = [path for path in _SYSTEM_PATHS if os.path.lexists(path)]
    for prefix in dict.fromkeys((sys.base_prefix, sys.prefix)):
        for name in ("bin", "lib", "lib64", "pyvenv.cfg"):  # not all of it: pip.conf may hold a password
            path = os.path.realpath(prefix) + "/" + name
            if os.path.lexists(path) and not any(path == p or path.startswith(p + "/") for p in paths):
                paths.append(path)
    return paths


def _import_folders() -> list[str]:
    return [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]


class Output:
    """What a stream of the program brought, up to a limit; the rest is read and dropped."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._kept = bytearray()
        self.cut = False

    def feed(self, data: bytes) -> None:
        """Add a piece."""
        room = self._limit_bytes - len(self._kept)
        self._kept += data[:room]
        self.cut |= len(data) > room

    def take(self) -> str:
        """The text so far; what comes later starts anew. Bytes that are not UTF-8 are written as \\xNN."""
        text = self._kept.decode("utf-8", errors="backslashreplace")
        self._kept.clear()
        return text


class SandboxProcess:
    """Start with `kind` "program" or "session"; then `send`, `pump`, and always `close`.

    request: what the far side needs at its start. without: protections left out; for the tests of the protections only.
    Raises SandboxError where there is no sandbox at all (Windows), or the system refuses to start processes.
    """

    def __init__(
        self, kind: str, limits: Limits, *, request: dict[str, object], without: Sequence[str] = ()
    ) -> None:
        if os.name != "posix":
            raise SandboxError(
                "The sandbox needs Linux or macOS; on Windows, run internlm2 in WSL or a container."
            )
        self.output, self.errors = Output(limits.output_bytes), Output(limits.output_bytes)
        self.replies: list[dict[str, object]] = []
        self.report: dict[str, object] | None = None
        self._folder: Path | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._inboxes: dict[str, wire.Inbox] = {"replies": wire.Inbox(), "report": wire.Inbox()}
        self._selector = selectors.DefaultSelector()
        self._pending = memoryview(b"")
        self._ends: dict[str, int] = {}
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="internlm2-sandbox-"))
            self._start()
            setup = self._setup(kind, limits, without)
            self.send({"setup": vars(setup), **request})
        except OSError as error:
            self.close()
            raise SandboxError(
                f"Cannot start a sandbox process: {error}. Free some disk space, memory or processes."
            ) from error
        except BaseException:
            self.close()
            raise

    def _setup(self, kind: str, limits: Limits, without: Sequence[str]) -> Setup:
        return Setup(
            kind=kind,
            folder=os.path.realpath(str(self._folder)),
            readable=readable_paths(),
            import_folders=_import_folders(),
            environment=_environment(),
            without=list(without),
            **{name: value for name, value in asdict(limits).items() if name != "output_bytes"},
        )

    def _start(self) -> None:
        names = ("requests", "replies", "report", "control", "output", "errors")
        theirs: dict[str, int] = {}
        try:
            for name in names:
                reading, writing = os.pipe()
                outward = name in ("requests", "control")
                theirs[name], self._ends[name] = (reading, writing) if outward else (writing, reading)
            numbers = [theirs[name] for name in names[:4]]
            self._child = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    "-c",
                    _START,
                    *map(str, numbers),
                    str(Path(__file__).parents[1]),
                ],
                stdin=subprocess.DEVNULL,
                stdout=theirs["output"],
                stderr=theirs["errors"],
                pass_fds=numbers,
                env=_environment(),
                cwd="/",
                start_new_session=True,
            )
        finally:
            for descriptor in theirs.values():
                os.close(descriptor)
        for name in names:
            os.set_blocking(self._ends[name], False)
            if name not in ("requests", "control"):
                self._selector.register(self._ends[name], selectors.EVENT_READ, name)

    def send(self, message: dict[str, object]) -> None:
        """Queue one message; `pump` writes it. Raises SandboxError when it is too long."""
        try:
            packed = wire.pack(message)
        except wire.WireError as error:
            raise SandboxError(f"The program is too large for the sandbox. {error}") from error
        self._pending = memoryview(bytes(self._pending) + packed)
        if self._ends["requests"] not in self._selector.get_map():
            self._selector.register(self._ends["requests"], selectors.EVENT_WRITE, "requests")

    def interrupt(self) -> None:
        """Have the supervisor send SIGINT to the code that runs."""
        with contextlib.suppress(OSError):
            os.write(self._ends["control"], _INTERRUPT)

    def pump(self, seconds: float, *, until: Callable[[], bool]) -> bool:
        """Move bytes until `until()` is true (then True) or the time is over or all pipes are closed (then False)."""
        deadline = time.monotonic() + seconds
        while not until():
            events = self._selector.select(max(0.0, deadline - time.monotonic()))
            for key, _ in events:
                if key.data == "requests":
                    self._write()
                else:
                    self._read(key.data)
            late_seconds = time.monotonic() - deadline
            if not self.is_open or (late_seconds >= 0 and not events) or late_seconds > _FLOOD_SECONDS:
                return until()
        return True

    @property
    def is_open(self) -> bool:
        """Whether anything can still come out."""
        return any(key.data != "requests" for key in self._selector.get_map().values())

    def _write(self) -> None:
        try:
            self._pending = self._pending[os.write(self._ends["requests"], self._pending) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._pending = memoryview(b"")
        if not self._pending:
            self._selector.unregister(self._ends["requests"])

    def _read(self, name: str) -> None:
        try:
            data = os.read(self._ends[name], _READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._selector.unregister(self._ends[name])
        elif name == "output":
            self.output.feed(data)
        elif name == "errors":
            self.errors.feed(data)
        else:
            self._receive(name, data)

    def _receive(self, name: str, data: bytes) -> None:
        try:
            messages = self._inboxes[name].feed(data)
        except wire.WireError:  # a session's code wrote to the pipe that its answers come through
            self._selector.unregister(self._ends[name])
            self.report = self.report or {"reason": "garbled"}
            return
        if name == "replies":
            self.replies += messages
        elif messages:
            self.report = messages[-1]

    def close(self) -> None:
        """End every process and remove the folder. Safe to call twice."""
        for name, descriptor in self._ends.items():
            if name not in ("output", "errors"):
                os.close(descriptor)  # the supervisor sees the end of `control` and ends everything
        child = self._child
        if child is not None:
            try:
                child.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        for name in ("output", "errors"):
            if name in self._ends:
                os.close(self._ends[name])
        self._ends = {}
        self._selector.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, onerror=_make_removable)
            self._folder = None


def _make_removable(function: Callable[..., object], path: str, _: object) -> None:
    """A folder that the program closed to its owner is opened and tried once more."""
    with contextlib.suppress(OSError):
        Path(path).parent.chmod(0o700)
        if Path(path).is_dir() and not Path(path).is_symlink():
            Path(path).chmod(0o700)
            shutil.rmtree(path, ignore_errors=True)
        else:
            function(path)


def _environment() -> dict[str, str]:
    """All that a program sees of the environment (HOME and TMPDIR are added); nothing is inherited."""
    return {
        "PATH": f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
