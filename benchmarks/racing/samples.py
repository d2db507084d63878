"""Samples on disk, one JSON line each, so that a broken run goes on; and the statistics of those that count."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ENOUGH = 5


@dataclass(frozen=True)
class Sample:
    """seconds for tokens; rates of the machine as mean of before and after; foreign and stolen: shares of all cores.

    is_kept: whether others were quiet. error: what the engine said when it failed; such a sample never counts.
    """

    shape: str
    cell: str
    engine: str
    round: int
    seconds: float
    tokens: int
    read: float
    int8: float
    bfloat16: float
    foreign: float
    stolen: float
    is_kept: bool
    error: str = ""

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Spread:
    """Median and range of so many values."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values), len(values))

    def shown(self, form: str = ".3g", *, scale: float = 1.0, unit: str = "") -> str:
        """As `median [low..high]`."""
        middle, low, high = (format(v * scale, form) + unit for v in (self.median, self.low, self.high))
        return f"{middle} [{low}..{high}]"


class Samples:
    """All samples of a run; appended to the file as they come."""

    def __init__(self, samples: Iterable[Sample] = (), path: Path | None = None) -> None:
        self.all = list(samples)
        self._path = path

    @classmethod
    def open(cls, path: Path) -> "Samples":
        """What a file holds; a last line that was cut off is left out."""
        samples = []
        if path.exists():
            lines = path.read_text(encoding="utf-8").split("\n")
            # NOTE: what follows the last line break is an unfinished line, and would spoil the next one.
            path.write_text("".join(f"{line}\n" for line in lines[:-1]), encoding="utf-8")
            samples = [Sample(**json.loads(line)) for line in lines[:-1]]
        return cls(samples, path)

    def add(self, sample: Sample) -> None:
        """Keep one, at once."""
        self.all.append(sample)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(sample)) + "\n")

    def is_done(self, shape: str, cell: str, engine: str, number: int) -> bool:
        """Whether a round has its sample, or has failed for good."""
        return any(
            (s.is_kept or s.error) and s.round == number
            for s in self._of(shape, cell, engine, all_of_them=True)
        )

    def kept(self, shape: str, cell: str, engine: str) -> list[Sample]:
        """Those that count, by round."""
        return sorted(self._of(shape, cell, engine), key=lambda sample: sample.round)

    def num_dropped(self) -> int:
        """Samples during which others were busy."""
        return sum(not s.is_kept and not s.error for s in self.all)

    def most_foreign(self) -> float:
        """The highest foreign load of the samples that count."""
        return max((s.foreign for s in self.all if s.is_kept), default=0.0)

    def _of(self, shape: str, cell: str, engine: str, *, all_of_them: bool = False) -> list[Sample]:
        return [
            s
            for s in self.all
            if (s.shape, s.cell, s.engine) == (shape, cell, engine) and (s.is_kept or all_of_them)
        ]

    def spread(self, shape: str, cell: str, engine: str, value: Callable[[Sample], float]) -> Spread | None:
        """Of one value of the samples that count; None without any."""
        values = [value(sample) for sample in self.kept(shape, cell, engine)]
        return Spread.of(values) if values else None

    def ratio(
        self, shape: str, cell: str, first: str, second: str, value: Callable[[Sample], float]
    ) -> Spread | None:
        """How many times the value of the second the first has, round by round; None without a common round."""
        firsts, seconds = (
            {s.round: value(s) for s in self.kept(shape, cell, name)} for name in (first, second)
        )
        values = [firsts[n] / seconds[n] for n in firsts if n in seconds]
        return Spread.of(values) if values else None
