# `pathlib` would lengthen the start of every sandbox by 4 ms.
# ruff: noqa: PTH101, PTH102, PTH103, PTH112, PTH114, PTH115, PTH120, PTH211
"""A new root folder: a small file system in memory, with the Python installation shown in it read-only.

Everything the program writes lies in that memory, bounded by `disk_bytes`, and is gone when the last process ends.
"""

import os

from internlm2.sandbox.inside import linux
from internlm2.sandbox.setup import Setup, Wall

HOME, TEMPORARY = "/box", "/tmp"
SHARED_MEMORY = "/dev/shm"
_DEVICES = ("null", "zero", "full", "random", "urandom")
_MAX_FILES = 20_000


def build_root(setup: Setup, wall: Wall, owner: int | None) -> None:
    """Build it at `setup.folder` and enter it. Raises OSError when the kernel refuses."""
    if "root" in setup.without:
        raise PermissionError("left out on request")
    linux.mount("none", "/", "none", linux.MS_REC | linux.MS_PRIVATE)
    options = f"size={setup.disk_bytes},nr_inodes={_MAX_FILES},mode=755"
    linux.mount("tmpfs", setup.folder, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, options)
    root = setup.folder
    for path in setup.readable:
        _show(path, root)
    os.mkdir(root + "/dev")
    for name in _DEVICES:
        _touch(f"{root}/dev/{name}")
        linux.mount(f"/dev/{name}", f"{root}/dev/{name}", "none", linux.MS_BIND)
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(target, f"{root}/dev/{name}")
    furnish(root, owner)
    os.mkdir(root + "/proc")
    try:
        linux.mount("proc", root + "/proc", "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
        wall.own_proc = True
    except OSError as error:
        wall.why_not = str(error)
    linux.enter_root(root)
    wall.own_root = True


def _show(path: str, root: str) -> None:
    """Show one path of the host at the same place; symbolic links are copied as links."""
    place = root + path
    if os.path.lexists(place) or not os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), place)
        return
    if os.path.isdir(path):
        os.mkdir(place)
    else:
        _touch(place)
    linux.bind_read_only(path, place)


def _touch(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))


def furnish(root: str, owner: int | None) -> None:
    """Make the writable folders under `root`, closed to other users."""
    os.chmod(root, 0o755)
    for folder in (HOME, TEMPORARY, SHARED_MEMORY):
        inner = root + folder
        os.makedirs(inner, exist_ok=True)
        os.chmod(inner, 0o700)
        if owner is not None:
            os.chown(inner, owner, owner)
