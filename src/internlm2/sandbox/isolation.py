"""What the sandbox keeps apart on this machine, measured by trying it, and said in plain words.

`examine_isolation` runs a small program in a sandbox that tries to look out. Nothing is assumed from version numbers.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from internlm2.sandbox.limits import Limits, SandboxError
from internlm2.sandbox.program import run_without

_PROBE_LIMITS = Limits(wall_seconds=10.0, cpu_seconds=5.0, memory_bytes=256 << 20, num_processes=8)
_PROBE = """
import json, os, socket

def refused(action):
    try:
        action()
    except (OSError, MemoryError):
        return True
    return False

def connect():
    # An address no packet leaves for: a refusal by the network itself ("refused") counts as reached.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as end:
        try:
            end.connect(("127.0.0.1", 9))
        except ConnectionRefusedError:
            pass

def fork_many():
    children = []
    try:
        for _ in range(12):
            child = os.fork()
            if child == 0:
                os.close(hold)
                os.read(wait, 1)
                os._exit(0)
            children.append(child)
    finally:
        os.close(hold)
        for child in children:
            os.waitpid(child, 0)

wait, hold = os.pipe()
secret = open("names.json").read()
print(json.dumps({
    "files": refused(lambda: open(json.loads(secret)["secret"]).read()),
    "network": refused(connect),
    "processes": refused(lambda: os.kill(json.loads(secret)["host"], 0)),
    "leftovers": refused(lambda: os.kill(os.getppid(), 0)),
    "memory": refused(lambda: bytearray(512 << 20)),
    "file_size": refused(lambda: os.posix_fallocate(os.open("big", os.O_CREAT | os.O_WRONLY), 0, 33 << 20)),
    "num_processes": refused(fork_many),
    "environment": len(os.environ) < 12,
}))
"""


@dataclass(frozen=True)
class Isolation:
    """True where the sandbox was seen to hold. why_not: what the kernel said when namespaces were refused, else empty.

    files: the host's files cannot be read. network: no connection, not even to this machine. processes: other processes
    cannot be signalled. memory, file_size, num_processes: the limits hold. environment: no variable is inherited.
    leftovers: daemons cannot outlive the program. disk: the total is bounded by the kernel, not only watched.
    system_calls: a seccomp filter is in place.
    """

    files: bool
    network: bool
    processes: bool
    memory: bool
    file_size: bool
    num_processes: bool
    environment: bool
    leftovers: bool
    disk: bool
    system_calls: bool
    why_not: str = ""

    def describe(self) -> list[str]:
        """Sentences for people: what is isolated in one, then one for each thing that is not."""
        held = [word for word, (name, _) in zip(_WORDS, _MISSING.items(), strict=True) if getattr(self, name)]
        lines = [f"Isolated on this machine: {', '.join(held) or 'nothing'}."]
        lines += [f"NOT isolated: {text}" for name, text in _MISSING.items() if not getattr(self, name)]
        if self.why_not:
            lines.append(f"Namespaces were refused by the system: {self.why_not}.")
        return lines + [f"Never isolated: {text}" for text in _ALWAYS]

    @property
    def is_complete(self) -> bool:
        """Whether everything that can be isolated is."""
        return all(getattr(self, name) for name in _MISSING)


_WORDS = (
    "files", "network", "other processes", "memory", "file size", "number of processes", "environment",
    "leftover processes", "disk space", "system calls",
)  # fmt: skip
_MISSING = {
    "files": "a program can read files of this machine that its user may read. Use a user who owns nothing.",
    "network": "a program can open network connections, also to this machine. Run where there is no network.",
    "processes": "a program can send signals to other processes of its user.",
    "memory": "the memory limit does not hold; a program can fill the machine's memory.",
    "file_size": "the limit on the size of a file does not hold.",
    "num_processes": "the limit on processes does not hold; a fork bomb can slow the machine down.",
    "environment": "a program sees environment variables of this process.",
    "leftovers": "a program that ends its supervisor may leave processes behind.",
    "disk": "disk space is watched 20 times a second, not bounded; for a moment more can be taken.",
    "system_calls": "system calls are not filtered; more of the kernel is within reach.",
}
_ALWAYS = (
    "the kernel is shared; a program that exploits a fault of the kernel gets out. A virtual machine holds more.",
    "processors and caches are shared; timing can be observed, and other work becomes slower.",
    "the Python installation with its packages, and the system's programs and libraries, can be read.",
)


def examine_isolation(*, without: Sequence[str] = ()) -> Isolation:
    """Try it (about 0.2 s). Raises SandboxError when no sandbox can be built here at all.

    without: protections left out; for the tests of the protections only.
    """
    with tempfile.TemporaryDirectory(prefix="internlm2-probe-") as folder:
        secret = Path(folder) / "secret"
        secret.write_text("x")
        Path(folder).chmod(0o755)  # readable to all: only a wall keeps it apart, not its mode
        secret.chmod(0o644)
        names = json.dumps({"secret": str(secret), "host": os.getpid()})
        outcome = run_without(without, _PROBE, limits=_PROBE_LIMITS, files={"names.json": names})
    if not outcome.passed:
        raise SandboxError(
            f"The sandbox does not work here ({outcome.status}): {outcome.detail}{outcome.errors}"
        )
    seen: dict[str, bool] = json.loads(outcome.output)
    wall = outcome.wall
    seen["leftovers"] |= wall.namespaces
    seen["memory"] &= wall.own_proc or not wall.namespaces  # else nobody can add up what the processes hold
    return Isolation(
        **seen,
        disk=wall.own_root,
        system_calls=wall.filter,
        why_not=wall.why_not,
    )
