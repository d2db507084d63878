"""An engine in a process of its own, seen from the race; `wire.py` is the other end."""

import contextlib
import json
import os
import signal
import subprocess
import threading
from pathlib import Path

from racing.engines import EngineSpec
from racing.models import Models
from racing.peers import Peers

LOAD_SECONDS = 1200.0  # at most: our first start packs the weights
ANSWER_SECONDS = 300.0


class WorkerError(Exception):
    """An engine could not load or measure."""


class Worker:
    """An engine in a process of its own, loaded and ready. Raises WorkerError when it ends or says what went wrong."""

    def __init__(
        self,
        spec: EngineSpec,
        models: Models,
        peers: Peers,
        log: Path,
        *,
        options: dict[str, object] | None = None,
    ) -> None:
        """options: settings that differ from those of `spec`."""
        self.spec, self._log = spec, log
        interpreter, script, settings, environment = spec.launch(models, peers)
        settings |= options or {}
        log.parent.mkdir(exist_ok=True)
        with log.open("a") as output:
            self._process = subprocess.Popen(
                [interpreter, script, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment,
                start_new_session=True,
            )
        ready = self._answer(LOAD_SECONDS)
        self.facts: dict[str, str] = ready["facts"]
        self.load_seconds: float = ready["seconds"]

    def ask(self, question: dict[str, object], *, patience_seconds: float = ANSWER_SECONDS) -> dict:
        """One measurement."""
        assert self._process.stdin is not None
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
        except OSError:
            raise WorkerError(f"{self.spec.name} has ended") from None
        return self._answer(patience_seconds)

    def _answer(self, patience_seconds: float) -> dict:
        assert self._process.stdout is not None
        watch = threading.Timer(patience_seconds, self._kill, (signal.SIGKILL,))
        watch.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watch.cancel()
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            code = self._process.poll()
            late = f" after {patience_seconds:.0f} s" if code == -signal.SIGKILL else ""
            raise WorkerError(f"{self.spec.name} has ended with {code}{late}; see {self._log}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        """End it, and what it started."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._kill(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._kill(signal.SIGKILL)
            self._process.wait(30)

    def _kill(self, how: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, how)
