"""A process that rank 0 starts for a split model, seen from both sides: how far it is, how it ends, and with whom.

It says on its stdout how far it is; what else it prints is kept in case it ends. It ends when its stdin does.
"""

import json
import logging
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import IO

from internlm2.errors import RequestError

MODULE = "internlm2.engine.workers"  # what it runs
_STAGE_MARK = "internlm2-worker: "  # begins the lines that say how far a process is
_LOOK_SECONDS = 1.0  # how often a worker looks whether rank 0 is there

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What a process must know to hold the part of its rank. num_threads: of each process, on a CPU."""

    path: str
    rank: int
    size: int
    address: str
    dtype: str
    device: str
    rope_mode: str
    num_threads: int


class Stage(IntEnum):
    """How far a process is: started, about to meet the others, with its part of the model in memory."""

    STARTED = 0
    READY = 1
    LOADED = 2


class Child:
    """One process: how far it is, and what its last words were. Raises RequestError when it cannot be started."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.rank = settings.rank
        self._news = _News()
        command = [sys.executable, "-P", "-m", MODULE, json.dumps(asdict(settings))]
        # It finds the packages where this process finds them, and not in the current folder, which is anybody's.
        places = os.pathsep.join(place or str(Path.cwd()) for place in sys.path)
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": places},
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # Ctrl-C at the terminal is for rank 0
            )
        except OSError as error:
            raise RequestError(
                f"Cannot start a process of a split model with {sys.executable}: {error}. Load it without "
                "tensor_parallel, or mend that."
            ) from error
        assert self.process.stdout is not None
        # NOTE: the thread does not know `self`: its stdin closes with the last reference, and the process ends.
        arguments = (self.process.stdout, self._news, settings.rank)
        self._reader = threading.Thread(target=_read_news, args=arguments, daemon=True)
        self._reader.start()

    @property
    def stage(self) -> Stage:
        """How far it is, as it said."""
        return self._news.stage

    @property
    def ended_seconds(self) -> float | None:
        """When it ended, by the monotonic clock; None while it is there."""
        if self.process.poll() is None:
            return None
        self._reader.join(1.0)
        return self._news.ended_seconds

    def last_words(self) -> str:
        """How a process that has ended did so: a sentence."""
        code = self.process.returncode
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed by signal {-code}"
        if code == -signal.SIGKILL:
            how += " (SIGKILL: somebody else's, or the system's when memory runs out)"
        said = f". Its last line was: {self._news.last_line.rstrip('.')}" if self._news.last_line else ""
        return f"the process of rank {self.rank} {how}{said}."

    def kill(self) -> None:
        """End it at once, and wait until it has."""
        self.process.kill()
        self.process.wait()
        self._reader.join(1.0)


@dataclass
class _News:
    """What a process has said: how far it is, the last line of all else, and when that was all."""

    stage: Stage = Stage.STARTED
    last_line: str = ""
    ended_seconds: float = math.inf


def _read_news(lines: IO[str], news: _News, rank: int) -> None:
    with lines:
        for line in lines:
            text = line.strip()
            if text.startswith(_STAGE_MARK):
                news.stage = Stage[text.removeprefix(_STAGE_MARK)]
            elif text:
                news.last_line = text[:500]
                _log.debug("Process %s of a split model: %s", rank, text)
    news.ended_seconds = time.monotonic()


def say(stage: Stage) -> None:
    """In a worker: tell rank 0 how far it is."""
    print(_STAGE_MARK + stage.name, flush=True)


def end_with_rank_0() -> None:
    """In a worker: end this process as soon as rank 0 has closed its end of stdin, or is gone."""
    parent = os.getppid()  # a fork of rank 0 would keep stdin open
    while os.getppid() == parent and not select.select([0], [], [], _LOOK_SECONDS)[0]:
        pass
    os._exit(1)
