# `pathlib` would lengthen the start of every sandbox by 4 ms.
# ruff: noqa: PTH112
"""The Linux system calls that Python 3.11 has no function for, through the C library.

Constants are from the kernel's own headers (sched.h, mount.h, prctl.h, landlock.h, seccomp.h).
"""

import ctypes
import os
import sys
from collections.abc import Sequence

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWCGROUP = 0x10000000, 0x20000000, 0x40000000, 0x02000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_NOATIME, MS_NODIRATIME, MS_REC, MS_PRIVATE, MS_RELATIME = 1024, 2048, 16384, 1 << 18, 1 << 21
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 22, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_PR_SET_KEEPCAPS = 8
_LAST_CAPABILITY = 63
READ_ANY_FILE = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_CAPGET = {"x86_64": 125, "aarch64": 90}
_SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
_SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD, _SYS_LANDLOCK_RESTRICT = 444, 445, 446

_libc = ctypes.CDLL(None, use_errno=True)
MACHINE = os.uname().machine


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Leave namespaces. Raises OSError."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """mount(2). Raises OSError."""
    code = _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    _check(code, f"mount {target}")


def unmount(folder: str) -> None:
    """Take away what is mounted here, if anything is."""
    _libc.umount2(folder.encode(), _MNT_DETACH)


def bind_read_only(source: str, target: str) -> None:
    """Show `source` at `target`, not writable. Raises OSError."""
    mount(source, target, "none", MS_BIND)
    # NOTE: flags that the source's file system carries are locked inside a user namespace and must be repeated
    carried = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME)
    if os.statvfs(target).f_flag & 4096:  # ST_RELATIME
        carried |= MS_RELATIME
    mount("none", target, "none", MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | carried)


def enter_root(folder: str) -> None:
    """Make `folder` (a mount point) the root, and let go of the old one. Raises OSError."""
    os.chdir(folder)
    _check(_libc.syscall(_SYS_PIVOT_ROOT[MACHINE], b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount")
    os.chdir("/")


def die_with_parent(signal_number: int) -> None:
    """Have the kernel send this signal when the parent ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0), "prctl")


def set_dumpable(dumpable: bool) -> None:
    """False: no process without privileges may trace this one or read its /proc entries."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, int(dumpable), 0, 0, 0), "prctl")


def become_subreaper() -> None:
    """Orphans among the descendants become children of this process."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def forbid_new_privileges() -> None:
    """From here on no program started gains rights (set-user-id bits are ignored)."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")


def forbid_regaining_capabilities() -> None:
    """Empty the bounding set. It needs the right to do so, and is done before `drop_capabilities`."""
    for capability in range(_LAST_CAPABILITY + 1):
        _libc.prctl(
            _PR_CAPBSET_DROP, capability, 0, 0, 0
        )  # fails above the kernel's last one, and for plain users


def keep_capabilities_over_user_change() -> None:
    """So that `drop_capabilities(keep=...)` has something to keep after setresuid."""
    _check(_libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0), "prctl")


def drop_capabilities(*, keep: int = 0) -> None:
    """Give up every capability for good, but those in the bits of `keep`. Raises OSError."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    held = (ctypes.c_uint32 * 6)()
    _check(_libc.syscall(_SYS_CAPGET[MACHINE], header, held), "capget")
    kept = held[1] & keep  # the permitted ones among them
    _check(_libc.syscall(_SYS_CAPSET[MACHINE], header, (ctypes.c_uint32 * 6)(kept, kept)), "capset")


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def install_filter(instructions: bytes) -> None:
    """Install a seccomp program (8 bytes an instruction) for this process and all it starts. Raises OSError."""
    program = _Program(len(instructions) // 8, instructions)
    _check(_libc.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0), "seccomp")


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


_FILE_ONLY_RIGHTS = 0b111 | 1 << 14 | 1 << 15  # execute, write, read, truncate, ioctl
_READ_RIGHTS = 1 | 1 << 2 | 1 << 3  # execute, read file, read folder


def landlock_version() -> int:
    """The kernel's Landlock interface version; 0 when there is none."""
    if sys.platform != "linux":
        return 0
    return max(0, _libc.syscall(_SYS_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1))


def restrict_files(readable: Sequence[str], writable: Sequence[str]) -> None:
    """Landlock: from here on only these paths can be opened (and, from version 4 on, no TCP port). Raises OSError."""
    version = landlock_version()
    if version < 1:
        raise OSError(38, "This kernel has no Landlock")
    num_rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    everything = (1 << num_rights) - 1
    rules = _Ruleset(everything, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _check(
        _libc.syscall(_SYS_LANDLOCK_CREATE, ctypes.byref(rules), ctypes.c_size_t(size), 0),
        "landlock_create_ruleset",
    )
    for path, rights in [(p, _READ_RIGHTS) for p in readable] + [(p, everything) for p in writable]:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # what does not exist needs no permission
        if not os.path.isdir(path):
            rights &= _FILE_ONLY_RIGHTS  # noqa: PLW2901
        rule = _Beneath(rights & everything, descriptor)
        _check(_libc.syscall(_SYS_LANDLOCK_ADD, ruleset, 1, ctypes.byref(rule), 0), "landlock_add_rule")
        os.close(descriptor)
    _check(_libc.syscall(_SYS_LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)
