"""A seccomp filter: the system calls that a program written by a model has no business making.

They fail with EPERM. Denied are: sockets other than Unix ones, looking into other processes, namespaces and mounts,
memory that no limit counts (memfd, System V), and the kernel's larger attack surfaces (io_uring, bpf, keys, perf).
Numbers are from the kernel's syscall tables for x86_64 and arm64.
"""

import os
import struct
import sys

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_NUMBERS: dict[str, dict[str, int]] = {
    "x86_64": {
        "socket": 41, "clone": 56, "clone3": 435, "ptrace": 101, "process_vm_readv": 310,
        "process_vm_writev": 311, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161,
        "unshare": 272, "setns": 308, "memfd_create": 319, "memfd_secret": 447, "shmget": 29, "semget": 64,
        "msgget": 68, "mq_open": 240, "io_uring_setup": 425, "bpf": 321, "perf_event_open": 298,
        "userfaultfd": 323, "keyctl": 250, "add_key": 248, "request_key": 249, "kexec_load": 246,
        "init_module": 175, "finit_module": 313, "open_tree": 428, "move_mount": 429, "fsopen": 430,
        "fsmount": 432, "mount_setattr": 442, "pidfd_getfd": 438, "kcmp": 312, "open_by_handle_at": 304,
        "vmsplice": 278, "quotactl": 179, "swapon": 167, "reboot": 169, "syslog": 103, "personality": 135,
        "name_to_handle_at": 303,
    },
    "aarch64": {
        "socket": 198, "clone": 220, "clone3": 435, "ptrace": 117, "process_vm_readv": 270,
        "process_vm_writev": 271, "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "unshare": 97,
        "setns": 268, "memfd_create": 279, "memfd_secret": 447, "shmget": 194, "semget": 190, "msgget": 186,
        "mq_open": 180, "io_uring_setup": 425, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282,
        "keyctl": 219, "add_key": 217, "request_key": 218, "kexec_load": 104, "init_module": 105,
        "finit_module": 273, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsmount": 432,
        "mount_setattr": 442, "pidfd_getfd": 438, "kcmp": 272, "open_by_handle_at": 265, "vmsplice": 75,
        "quotactl": 60, "swapon": 224, "reboot": 142, "syslog": 116, "personality": 92,
        "name_to_handle_at": 264,
    },
}  # fmt: skip
_NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEW*
_AF_UNIX, _EPERM, _ENOSYS = 1, 1, 38
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_AT_NUMBER, _AT_ARCH, _AT_FIRST_ARGUMENT = 0, 4, 16


def has_filter() -> bool:
    """Whether this is a Linux on a processor whose system calls are known here."""
    return sys.platform == "linux" and os.uname().machine in _NUMBERS


def filter_program() -> bytes:
    """The classic BPF program for this processor. Raises KeyError where `has_filter()` is False."""
    machine = os.uname().machine
    numbers = dict(_NUMBERS[machine])
    steps = [
        _step(_LOAD, _AT_ARCH),
        _step(_EQUAL, _AUDIT_ARCH[machine], 1, 0),
        _step(_RETURN, _KILL),  # a 32-bit call from a 64-bit program
        _step(_LOAD, _AT_NUMBER),
    ]
    if machine == "x86_64":
        steps += [_step(_AT_LEAST, 0x40000000, 0, 1), _step(_RETURN, _KILL)]  # the x32 numbers
    socket, clone, clone3 = numbers.pop("socket"), numbers.pop("clone"), numbers.pop("clone3")
    steps += [
        # socket(): Unix ones only
        _step(_EQUAL, socket, 0, 4),
        _step(_LOAD, _AT_FIRST_ARGUMENT),
        _step(_EQUAL, _AF_UNIX, 1, 0),
        _step(_RETURN, _ERRNO | _EPERM),
        _step(_RETURN, _ALLOW),
        # clone(): no new namespaces
        _step(_EQUAL, clone, 0, 4),
        _step(_LOAD, _AT_FIRST_ARGUMENT),
        _step(_ANY_BIT, _NAMESPACE_FLAGS, 0, 1),
        _step(_RETURN, _ERRNO | _EPERM),
        _step(_RETURN, _ALLOW),
        # clone3() hides its flags from filters: "not there", and the C library takes clone()
        _step(_EQUAL, clone3, 0, 1),
        _step(_RETURN, _ERRNO | _ENOSYS),
    ]
    for number in numbers.values():
        steps += [_step(_EQUAL, number, 0, 1), _step(_RETURN, _ERRNO | _EPERM)]
    return b"".join([*steps, _step(_RETURN, _ALLOW)])


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
