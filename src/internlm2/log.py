"""The only logging set-up, and progress reports: talk goes to stderr, results to stdout.

On a terminal, work shows a bar with rate and time left; elsewhere one line for every 10 %.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

logger = logging.getLogger("internlm2")


def configure(*, verbosity: int = 0) -> None:
    """Send the package's log to stderr. verbosity: -1 errors only, 0 warnings and progress, 1 debug."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s" if verbosity < 1 else "%(name)s: %(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel({-1: logging.ERROR, 0: logging.INFO}.get(verbosity, logging.DEBUG))


@dataclass
class LineProgress:
    """Progress for logs and pipes: a line for each tenth, nothing for work that ends within 2 seconds."""

    description: str
    total: float
    unit: str
    done: float = 0.0
    started_seconds: float = field(default_factory=time.monotonic)
    _next_tenth: int = 1

    def advance(self, amount: float) -> None:
        """Count `amount` more units as done."""
        self.done += amount
        tenth = int(10 * self.done / self.total) if self.total else 10
        elapsed = time.monotonic() - self.started_seconds
        if tenth >= self._next_tenth:
            self._next_tenth = tenth + 1
            if elapsed > 2.0:
                rate = self.done / elapsed
                left = max(0.0, self.total - self.done) / rate
                logger.info(
                    "%s: %d%%, %.1f %s/s, %.0f s left", self.description, 10 * tenth, rate, self.unit, left
                )


class BarProgress:
    """Progress for a terminal: a rich bar on stderr with rate and time left."""

    def __init__(self, description: str, total: float, unit: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._unit = unit
        self._task = self._progress.add_task(description, total=total, rate="")
        self._started_seconds = time.monotonic()
        self._progress.start()

    def advance(self, amount: float) -> None:
        """Count `amount` more units as done."""
        elapsed = time.monotonic() - self._started_seconds
        done = self._progress.tasks[0].completed + amount
        rate = f"{done / elapsed:.1f} {self._unit}/s" if elapsed > 0.2 else ""
        self._progress.update(self._task, advance=amount, rate=rate)

    def stop(self) -> None:
        """Remove the bar."""
        self._progress.stop()


@contextmanager
def progress(description: str, *, total: float, unit: str = "MB") -> Iterator[LineProgress | BarProgress]:
    """Report on work of `total` units; call `.advance(n)` on what this yields."""
    if sys.stderr.isatty() and logger.isEnabledFor(logging.INFO):
        bar = BarProgress(description, total, unit)
        try:
            yield bar
        finally:
            bar.stop()
    else:
        yield LineProgress(description, total, unit)
