# `pathlib` would lengthen the start of every sandbox by 4 ms.
# ruff: noqa: PTH123
"""The first process on the far side: leaves the host's namespaces and starts the supervisor as process 1 of new ones.

Pipes come as numbers on the command line: requests (host -> here), replies, report (here -> host), control (host ->
here, kept open as long as the host lives).
"""

import os
import signal
import sys

from internlm2.sandbox.inside import linux
from internlm2.sandbox.inside.supervise import Pipes, Users, supervise
from internlm2.sandbox.setup import Setup, Wall
from internlm2.sandbox.wire import receive, send

PIPE_NAMES = ("requests", "replies", "report", "control")
_FIRST_USER = 1_900_000_000
_PROCESS_NUMBERS = 1 << 22


def main() -> None:
    """Read the request, build the wall, run, end."""
    pipes = Pipes(**dict(zip(PIPE_NAMES, map(int, sys.argv[1:5]), strict=True)))
    request = receive(pipes.requests)
    if request is None:
        return
    setup = Setup(**request["setup"])  # pyrefly: ignore[bad-argument-type, bad-unpacking]
    users = _choose_users()
    wall = Wall()
    wall.own_user = users.worker
    if sys.platform == "linux":
        _leave_namespaces(setup, wall)
    supervisor = os.fork()
    if supervisor == 0:
        _supervisor(setup, wall, pipes, request, users)
    for descriptor in (pipes.requests, pipes.replies, pipes.report, pipes.control, 0, 1, 2):
        os.close(descriptor)
    os.waitpid(supervisor, 0)
    os._exit(0)  # without tidying up: it takes 3 ms


def _supervisor(setup: Setup, wall: Wall, pipes: Pipes, request: dict[str, object], users: Users) -> None:
    code = 1
    try:
        if sys.platform == "linux":
            linux.die_with_parent(signal.SIGKILL)
            linux.set_dumpable(False)
            linux.become_subreaper()
        supervise(setup, wall, pipes, request, users)
        code = 0
    except BaseException as error:  # whatever it is, the host must hear of it
        send(pipes.report, {"broken": f"{type(error).__name__}: {error}"})
    finally:
        os._exit(code)


def _leave_namespaces(setup: Setup, wall: Wall) -> None:
    if "namespaces" in setup.without:
        wall.why_not = "left out on request"
        linux.set_dumpable(False)
        return
    flags = linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS
    if "network" not in setup.without:
        flags |= linux.CLONE_NEWNET
    user, group = os.geteuid(), os.getegid()
    try:
        if user == 0:
            linux.unshare(flags)
        else:
            linux.unshare(flags | linux.CLONE_NEWUSER)
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                _write(f"/proc/self/{name}", text)
        wall.namespaces = True
    except OSError as error:
        wall.why_not = str(error)
    linux.set_dumpable(False)


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _choose_users() -> Users:
    """As root: two user numbers nobody else has, from our process number. Else: we cannot change who we are."""
    if os.geteuid() != 0 or sys.platform != "linux":
        return Users(worker=None, checker=None)
    with open("/proc/self/uid_map", encoding="ascii") as file:
        top = max(int(start) + int(count) for start, _, count in (line.split() for line in file))
    if top > _FIRST_USER + 2 * _PROCESS_NUMBERS:
        first = _FIRST_USER + 2 * os.getpid()
    elif top > 60_000:  # a container with a small range
        first = 20_000 + 2 * (os.getpid() % 20_000)
    else:
        return Users(worker=None, checker=None)
    return Users(worker=first, checker=first + 1)
