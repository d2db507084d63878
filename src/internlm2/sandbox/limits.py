"""What a program may use, and the errors of this room."""

import math
from dataclasses import dataclass, fields

from internlm2.errors import InternLM2Error

_MIB = 1 << 20
_LEAST_MEMORY_BYTES = 64 * _MIB


class SandboxError(InternLM2Error):
    """A sandbox that cannot be built on this machine, or that is asked for something it does not do."""


@dataclass(frozen=True)
class Limits:
    """Of one program with all its processes, or of one interpreter session.

    wall_seconds: of a program, or of one `execute` call of a session.
    cpu_seconds: processor time of all processes together, in a session over its whole life.
    memory_bytes: address space of each process, and resident memory of all together. At least 64 MiB.
    num_processes: processes and threads at one time.
    file_bytes: size of one file. disk_bytes: of all files together.
    output_bytes: of standard output, and again of standard error. A program that writes more is ended; a session's
    output is cut.
    Raises SandboxError for a value that is not positive.
    """

    wall_seconds: float = 10.0
    cpu_seconds: float = 10.0
    memory_bytes: int = 1024 * _MIB
    num_processes: int = 16
    file_bytes: int = 32 * _MIB
    disk_bytes: int = 64 * _MIB
    output_bytes: int = _MIB

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value > 0 and math.isfinite(value)):
                raise SandboxError(f"Limits: {field.name} is {value}; it must be a number above 0.")
        if self.memory_bytes < _LEAST_MEMORY_BYTES:
            raise SandboxError(
                f"Limits: memory_bytes is {self.memory_bytes:,}; Python itself needs {_LEAST_MEMORY_BYTES:,} or more."
            )
