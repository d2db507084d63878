# `pathlib` would lengthen the start of every sandbox by 4 ms.
# ruff: noqa: PTH116, PTH123, PTH208
"""What the processes of a sandbox use together, from /proc, and how to end them where no namespace does it."""

import os
import signal
import time
from types import SimpleNamespace

from internlm2.sandbox.setup import Wall

_KILL_SECONDS = 2.0


class Usage(SimpleNamespace):
    """Of all processes together. Memory that a fork shares with its parent counts for each."""

    memory_bytes: int
    cpu_seconds: float


class _Process(SimpleNamespace):
    number: int
    parent: int
    ticks: int
    pages: int


def usage(wall: Wall) -> Usage:
    """Memory and processor time of every process below the supervisor; 0 where /proc cannot tell."""
    if wall.own_proc:
        mine = [process for process in _processes() if process.number != 1]
    elif wall.namespaces:
        return Usage(
            memory_bytes=0, cpu_seconds=0.0
        )  # NOTE: /proc shows the host with numbers that are not ours
    else:
        mine = _descendants(_processes())
    shared = _shared_pages()
    page, tick = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
    ended = os.times()
    return Usage(
        memory_bytes=sum(max(0, p.pages - shared) for p in mine) * page,
        cpu_seconds=sum(p.ticks for p in mine) / tick + ended.children_user + ended.children_system,
    )


def _processes() -> list[_Process]:
    found = []
    try:
        names = os.listdir("/proc")
    except FileNotFoundError:
        return []
    for name in names:
        if name.isdigit():
            try:
                descriptor = os.open(f"/proc/{name}/stat", os.O_RDONLY)
            except OSError:
                continue
            try:
                text = os.read(descriptor, 2048)
            except OSError:
                continue
            finally:
                os.close(descriptor)
            fields = text[text.rindex(b")") + 2 :].split()  # NOTE: the name before it may hold anything
            ticks = sum(int(field) for field in fields[11:15])
            found.append(
                _Process(number=int(name), parent=int(fields[1]), ticks=ticks, pages=int(fields[21]))
            )
    return found


def _shared_pages() -> int:
    """Pages of libraries that every Python here maps; the supervisor's own number stands for all."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[2])
    except OSError:
        return 0


def _descendants(found: list[_Process]) -> list[_Process]:
    children: dict[int, list[_Process]] = {}
    for process in found:
        children.setdefault(process.parent, []).append(process)
    mine, waiting = [], [os.getpid()]
    while waiting:
        for child in children.get(waiting.pop(), []):
            mine.append(child)
            waiting.append(child.number)
    return mine


def kill_all(user: int | None) -> None:
    """End every descendant, and as root every process of the sandbox's own user, until none is left."""
    give_up = time.monotonic() + _KILL_SECONDS
    while time.monotonic() < give_up:
        found = _processes()
        victims = {process.number for process in _descendants(found)}
        if user is not None:
            victims |= {process.number for process in found if _owner(process.number) == user}
        if not victims:
            return
        for number in victims:
            try:
                os.kill(number, signal.SIGKILL)
            except OSError:
                continue
        _reap()
        time.sleep(0.002)


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def _owner(number: int) -> int:
    try:
        return os.stat(f"/proc/{number}").st_uid
    except OSError:
        return -1


def folder_bytes(folder: str) -> int:
    """How much disk the files below `folder` take."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(f"{path}/{name}").st_blocks * 512
            except OSError:
                continue
    return total
