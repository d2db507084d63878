"""Process 1 of the sandbox: starts the untrusted code and the tests, watches them, ends them all.

It runs no untrusted code, reads nothing that untrusted code writes, and alone reports to the host. When it ends, the
kernel ends every other process of its namespace, daemons that forked twice included.
"""

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

from internlm2.sandbox.inside import checker, linux, session, worker
from internlm2.sandbox.inside.enclose import enclose
from internlm2.sandbox.inside.processes import folder_bytes, kill_all, usage
from internlm2.sandbox.inside.root import HOME, TEMPORARY, build_root, furnish
from internlm2.sandbox.inside.syscalls import has_filter
from internlm2.sandbox.setup import Setup, Wall
from internlm2.sandbox.wire import send

_TICK_SECONDS = 0.05
_GRACE_SECONDS = 0.5
_INTERRUPT = b"i"
_UNFINISHED = 70


class Pipes(SimpleNamespace):
    """Descriptors to and from the host."""

    requests: int
    replies: int
    report: int
    control: int


class Users(SimpleNamespace):
    """The unprivileged users that run the untrusted code and the tests. None: stay who we are."""

    worker: int | None
    checker: int | None


def supervise(setup: Setup, wall: Wall, pipes: Pipes, request: dict[str, object], users: Users) -> None:
    """Run one program with its tests, or one session, and report how it ended. Raises OSError, WireError."""
    os.umask(0o022)
    home = _furnish(setup, wall, users.worker)
    start = _Starter(setup, wall, home, request)
    if setup.kind == "session":
        keep = (pipes.requests, pipes.replies)
        worker_pid = start(users.worker, keep, lambda: session.serve(*keep))
        checker_pid = 0
    else:
        calls_in, calls_out = os.pipe()  # tests -> code
        answers_in, answers_out = os.pipe()  # code -> tests
        keep = (calls_in, answers_out)
        worker_pid = start(users.worker, keep, lambda: worker.serve(str(request["code"]), *keep))
        for descriptor in keep:
            os.close(descriptor)
        ends = (pipes.requests, pipes.replies, calls_out, answers_in)
        checker_pid = start(users.checker, ends, lambda: checker.check(*ends), trusted=True)
        for descriptor in ends[2:]:
            os.close(descriptor)
    start.check()
    for descriptor in (pipes.requests, pipes.replies, 0, 1, 2):
        os.close(descriptor)
    watch = _Watch(setup, wall, pipes.control, worker_pid, checker_pid)
    reason = watch.run()
    if not wall.namespaces:
        kill_all(users.worker)
    send(pipes.report, {"reason": reason, "worker": watch.ended.get(worker_pid), "wall": vars(wall)})


def _furnish(setup: Setup, wall: Wall, owner: int | None) -> str:
    """Build the new root if the kernel lets us, else use the host's private folder; returns the home folder."""
    if wall.namespaces and "files" not in setup.without:
        try:
            build_root(setup, wall, owner)
            return HOME
        except OSError as error:  # some systems give user namespaces, but no right to mount in them
            linux.unmount(setup.folder)
            wall.why_not = str(error)
    wall.landlock = linux.landlock_version() > 0 and "files" not in setup.without
    furnish(setup.folder, owner)
    return setup.folder + HOME


class _Starter:
    """Forks a process, encloses it, runs one function in it."""

    def __init__(self, setup: Setup, wall: Wall, home: str, request: dict[str, object]) -> None:
        self._setup, self._wall, self._home, self._request = setup, wall, home, request
        self._waiting: list[int] = []
        wall.filter = "filter" not in setup.without and has_filter()

    def __call__(
        self, user: int | None, keep: Sequence[int], run: Callable[[], None], *, trusted: bool = False
    ) -> int:
        reading, writing = os.pipe()
        child = os.fork()
        if child:
            os.close(writing)
            self._waiting.append(reading)
            return child
        try:
            try:
                enclose(self._setup, self._wall, user=user, keep=[*keep, writing], trusted=trusted)
                self._settle(trusted=trusted)
            except BaseException as error:
                os.write(writing, f"{type(error).__name__}: {error}"[:2000].encode())
                raise
            os.close(writing)
            run()
        finally:
            os._exit(_UNFINISHED)
        raise AssertionError("unreachable")

    def check(self) -> None:
        """Wait until the processes stand behind their wall. Raises OSError when one could not."""
        for descriptor in self._waiting:
            problem = os.read(descriptor, 2000)
            os.close(descriptor)
            if problem:
                raise OSError(problem.decode())

    def _settle(self, *, trusted: bool) -> None:
        temporary = self._home.removesuffix(HOME) + TEMPORARY
        os.environ.clear()
        os.environ.update(self._setup.environment | {"HOME": self._home, "TMPDIR": temporary})
        sys.path += self._setup.import_folders
        if trusted:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            os.chdir("/")
            return
        os.umask(0o077)
        os.chdir(self._home)
        sys.path.insert(0, self._home)
        worker.prepare(self._request)


class _Watch:
    """Waits for the end, for a command of the host, or for a limit to be passed."""

    def __init__(self, setup: Setup, wall: Wall, control: int, worker_pid: int, checker_pid: int) -> None:
        self._setup, self._wall, self._control = setup, wall, control
        self._worker, self._checker = worker_pid, checker_pid
        self.ended: dict[int, int] = {}  # process -> exit code, negative for a signal

    def run(self) -> str:
        """Returns which limit was passed ("wall", "cpu", "memory", "disk"), "host" when the host is gone, or ""."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        if sys.platform == "linux":  # else the tick below notices their end
            for process in (self._worker, self._checker):
                try:
                    poll.register(os.pidfd_open(process), select.POLLIN)
                except (
                    OSError
                ):  # no such process: a session has no tests. A kernel before 5.3: the tick notices
                    continue
        deadline = time.monotonic() + self._setup.wall_seconds
        while True:
            events = poll.poll(_TICK_SECONDS * 1000)
            for descriptor, _ in events:
                if descriptor != self._control:
                    poll.unregister(descriptor)
                elif not self._command():
                    return "host"
            self._reap()
            if self._worker in self.ended and self._checker in {0, *self.ended}:
                return ""
            if not self.ended.keys().isdisjoint(
                {self._worker, self._checker}
            ):  # the other has a moment to follow
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            if reason := self._passed_limit(deadline):
                return reason

    def _command(self) -> bool:
        command = os.read(self._control, 1)
        if command == _INTERRUPT and self._worker not in self.ended:
            os.kill(self._worker, signal.SIGINT)
        return bool(command)

    def _reap(self) -> None:
        while True:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            if process in (self._worker, self._checker):  # the others are orphans
                self.ended[process] = os.waitstatus_to_exitcode(status)

    def _passed_limit(self, deadline: float) -> str:
        if time.monotonic() > deadline:
            return "" if self._worker in self.ended or self._checker in self.ended else "wall"
        if "limits" in self._setup.without:
            return ""
        used = usage(self._wall)
        if used.memory_bytes > self._setup.memory_bytes:
            return "memory"
        if used.cpu_seconds > self._setup.cpu_seconds:
            return "cpu"
        if not self._wall.own_root and folder_bytes(self._setup.folder) > self._setup.disk_bytes:
            return "disk"
        return ""
