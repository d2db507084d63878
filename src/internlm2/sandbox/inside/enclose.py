# `pathlib` would lengthen the start of every sandbox by 4 ms.
# ruff: noqa: PTH116, PTH120, PTH208
"""The last steps before untrusted code runs in this process: limits, another user, no rights, fewer system calls."""

import os
import resource
import sys
from collections.abc import Sequence

from internlm2.sandbox.inside import linux
from internlm2.sandbox.inside.syscalls import filter_program
from internlm2.sandbox.setup import Setup, Wall

_MAX_OPEN_FILES = 256


def enclose(setup: Setup, wall: Wall, *, user: int | None, keep: Sequence[int], trusted: bool) -> None:
    """Put up what is left of the wall around this process; it cannot be taken down again.

    keep: the descriptors that stay open. trusted: True for the tests, which no other process may look into.
    Raises OSError when a protection that this machine has cannot be put up.
    """
    os.setsid()
    _close_all_but(keep)
    _mark_for_the_out_of_memory_killer()
    _limit(setup, user=user, in_namespace=wall.namespaces)
    if sys.platform != "linux":
        return
    if wall.landlock:
        linux.forbid_new_privileges()
        linux.restrict_files([*setup.readable, "/dev"], [setup.folder, "/dev/null"])
    if "user" not in setup.without:
        _become_nobody(user, landlock=wall.landlock)
    linux.set_dumpable(not trusted)
    linux.forbid_new_privileges()
    if wall.filter:
        linux.install_filter(filter_program())


def _become_nobody(user: int | None, *, landlock: bool) -> None:
    # NOTE: as root without namespaces, Python itself may lie where other users cannot go (/root/.local). Landlock
    # holds the program to the few readable paths all the same, so there it may keep the right to pass closed folders.
    closed = user is not None and landlock and _is_closed(os.__file__)
    linux.forbid_regaining_capabilities()
    if user is not None:
        if closed:
            linux.keep_capabilities_over_user_change()
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    linux.drop_capabilities(keep=linux.READ_ANY_FILE if closed else 0)


def _is_closed(path: str) -> bool:
    """Whether other users cannot reach this file."""
    while path != "/":
        path = os.path.dirname(path)
        if not os.stat(path).st_mode & 0o001:
            return True
    return False


def _close_all_but(keep: Sequence[int]) -> None:
    low = 3
    for descriptor in sorted(keep):
        if descriptor >= low:
            os.closerange(low, descriptor)
            low = descriptor + 1
    os.closerange(low, 1 << 16)


def _limit(setup: Setup, *, user: int | None, in_namespace: bool) -> None:
    if "limits" in setup.without:
        return
    cpu_seconds = int(setup.cpu_seconds) + 1
    limits = {
        "RLIMIT_CPU": (cpu_seconds, cpu_seconds + 1),
        "RLIMIT_FSIZE": setup.file_bytes,
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": _MAX_OPEN_FILES,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_NPROC": setup.num_processes + _others(user, in_namespace=in_namespace),
        "RLIMIT_AS": setup.memory_bytes,
    }
    for name, value in limits.items():
        kind = getattr(
            resource, name, None
        )  # not every system has them all; `Isolation` says what is missing
        if kind is None or (name == "RLIMIT_AS" and sys.platform == "darwin"):
            continue
        soft, hard = value if isinstance(value, tuple) else (value, value)
        most = resource.getrlimit(kind)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(kind, (soft, hard))


def _others(user: int | None, *, in_namespace: bool) -> int:
    """How many processes that are not the program's count towards its limit."""
    if user is not None:
        return 0
    if in_namespace:
        return 3  # launcher, supervisor, tests
    mine = os.geteuid()
    try:
        names = [name for name in os.listdir("/proc") if name.isdigit()]
    except FileNotFoundError:
        return 1000  # a system without /proc: a loose limit is better than none
    return sum(_num_threads(name) for name in names if _owner(name) == mine)


def _owner(name: str) -> int:
    try:
        return os.stat(f"/proc/{name}").st_uid
    except OSError:
        return -1


def _num_threads(name: str) -> int:
    try:
        return len(os.listdir(f"/proc/{name}/task"))
    except OSError:
        return 0


def _mark_for_the_out_of_memory_killer() -> None:
    """Should the machine run out of memory all the same, this process is the first to go."""
    try:
        descriptor = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
    except OSError:
        return
    try:
        os.write(descriptor, b"1000")
    finally:
        os.close(descriptor)
