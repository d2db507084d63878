"""Samples of something that reads memory, each between two streaming reads of the same moment."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from internlm2.engine.bench import foreign_load
from internlm2.kernels.library import Library
from internlm2.kernels.packed import allocate

SAMPLES = 5
TRIES = 14  # samples at most, the dropped ones counted
PROBE_BYTES = 256 << 20
LOUD = 0.05
LISTEN_SECONDS = 0.15  # after each sample, for what others do


@dataclass(frozen=True)
class Sample:
    """seconds of one run; bytes per second of the streaming read around it."""

    seconds: float
    probe: float


@dataclass(frozen=True)
class Samples:
    """The quiet samples of each competitor, taken in turns, and how many rounds were dropped."""

    each: tuple[list[Sample], ...]
    num_dropped: int

    @property
    def is_enough(self) -> bool:
        """Whether there are as many as a median needs."""
        return len(self.each[0]) >= SAMPLES

    def seconds(self, index: int = 0) -> float:
        """Median of one competitor."""
        return statistics.median(sample.seconds for sample in self.each[index])

    def probe(self) -> float:
        """Median of the streaming reads beside the first."""
        return statistics.median(sample.probe for sample in self.each[0])

    def share(self, num_bytes: int) -> str:
        """Of the streaming-read rate, when a run of the first reads so many bytes."""
        return spread([num_bytes / s.seconds / s.probe for s in self.each[0]], percent=True)

    def ratio(self) -> str:
        """How many times faster the first is than the second, round by round."""
        pairs = zip(*self.each, strict=True)
        return spread([second.seconds / first.seconds for first, second in pairs])


class Meter:
    """Takes samples. It holds the memory that the probe reads."""

    def __init__(self, built: Library) -> None:
        self._built = built
        self._memory = allocate(PROBE_BYTES).fill_(1)

    def measure(self, competitors: Sequence[Callable[[], object]]) -> Samples:
        """In turns, until there are SAMPLES quiet rounds or TRIES have been made."""
        for run in competitors:
            run()  # builds what is built on first use
        each: tuple[list[Sample], ...] = tuple([] for _ in competitors)
        num_dropped = 0
        while len(each[0]) < SAMPLES and num_dropped < TRIES - SAMPLES:
            round_of = [self._sample(run) for run in competitors]
            load = foreign_load(LISTEN_SECONDS)
            if load is not None and load > LOUD:
                num_dropped += 1
                continue
            for samples, sample in zip(each, round_of, strict=True):
                samples.append(sample)
        return Samples(each, num_dropped)

    def _sample(self, run: Callable[[], object]) -> Sample:
        before = self._probe()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        return Sample(seconds, (before + self._probe()) / 2)

    def _probe(self) -> float:
        start = time.perf_counter()
        self._built.read(self._memory.data_ptr(), len(self._memory), torch.get_num_threads())
        return len(self._memory) / (time.perf_counter() - start)


def spread(values: list[float], *, percent: bool = False) -> str:
    """Median and range."""
    low, middle, high = (f(values) for f in (min, statistics.median, max))
    if percent:
        return f"{middle:.0%} [{low:.0%}..{high:.0%}]"
    return f"{middle:.2f} [{low:.2f}..{high:.2f}]"
