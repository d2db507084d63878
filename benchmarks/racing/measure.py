"""One sample: an engine's figure, the machine's rates just before and after it, and what others did meanwhile."""

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from internlm2.kernels.library import Library
from internlm2.kernels.packed import allocate

PROBE_BYTES = 256 << 20
_PEAK_ROUNDS = 600_000  # about 5 ms
_REPEATS = 3
_PROC = Path("/proc")


@dataclass(frozen=True)
class Rates:
    """Of the machine at one moment: bytes per second of a streaming read, operations per second; 0: not measured."""

    read: float
    int8: float
    bfloat16: float


class Probe:
    """Measures the machine. It holds the memory that it reads."""

    def __init__(self, built: Library, peak: Path, *, threads: int) -> None:
        self._built = built
        self._memory = allocate(PROBE_BYTES).fill_(1)
        self._threads = threads
        self._peak = ctypes.CDLL(str(peak)) if peak.exists() else None
        if self._peak is not None:
            for function in (self._peak.peak_int8, self._peak.peak_bfloat16):
                function.restype, function.argtypes = ctypes.c_int64, (ctypes.c_int64,)

    def rates(self) -> Rates:
        """Medians of a few short runs, 0.1 s together."""
        read = statistics.median(self._read() for _ in range(_REPEATS))
        if self._peak is None:
            return Rates(read, 0.0, 0.0)
        with ThreadPoolExecutor(self._threads) as pool:
            each = (self._peak.peak_int8, self._peak.peak_bfloat16)
            int8, bfloat16 = (
                statistics.median(self._operations(pool, f) for _ in range(_REPEATS)) for f in each
            )
        return Rates(read, int8, bfloat16)

    def _read(self) -> float:
        start = time.perf_counter()
        self._built.read(self._memory.data_ptr(), len(self._memory), self._threads)
        return len(self._memory) / (time.perf_counter() - start)

    def _operations(self, pool: ThreadPoolExecutor, function: Callable[[int], int]) -> float:
        start = time.perf_counter()
        operations = sum(pool.map(function, [_PEAK_ROUNDS] * self._threads))
        return operations / (time.perf_counter() - start)


@dataclass
class Listening:
    """What others used while a block ran, as a share of all cores; and what the host took away."""

    foreign: float = 0.0
    stolen: float = 0.0


@contextmanager
def listening(proc: Path = _PROC) -> Iterator[Listening]:
    """Compare what the processor did with what this process and its descendants did."""
    heard = Listening()
    before, own_before = _machine(proc), _own_ticks(proc, os.getpid())
    yield heard
    after, own_after = _machine(proc), _own_ticks(proc, os.getpid())
    total = max(1, after[0] - before[0])
    heard.stolen = (after[2] - before[2]) / total
    heard.foreign = max(0.0, (after[1] - before[1] - (own_after - own_before)) / total)


def _machine(proc: Path) -> tuple[int, int, int]:
    """Ticks in all, busy and stolen, of all cores together."""
    numbers = [int(x) for x in (proc / "stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle, stolen = numbers[3] + numbers[4], numbers[7]
    return sum(numbers), sum(numbers) - idle - stolen, stolen


def _own_ticks(proc: Path, root: int) -> int:
    """Ticks of a process and all that descend from it, those included that have ended and were waited for."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in proc.glob("[0-9]*"):
        try:
            # NOTE: the second field is the name in brackets and may hold blanks and brackets.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        pid = int(entry.name)
        parents[pid] = int(fields[1])
        ticks[pid] = sum(int(x) for x in fields[11:15])
    return sum(count for pid, count in ticks.items() if _descends(pid, root, parents))


def _descends(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid != root and pid in parents:
        pid = parents[pid]
    return pid == root
