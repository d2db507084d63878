"""Several models as one, each in a process of its own on any machine of a Ray cluster (extra `ray`).

Questions are dealt in small batches to whoever has room. A worker that dies gives its open questions back: others, or
the same one after its restart, answer them. Everything else is as with one model: the caller judges, keeps and resumes.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, Self

from internlm2.errors import InternLM2Error, MissingDependencyError, check
from internlm2.eval.model import Answer, LanguageModel, Request
from internlm2.eval.task import EvalError
from internlm2.log import logger

try:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when it is imported; we report to nobody
    import ray
    from ray.exceptions import ActorDiedError, RayActorError, RayTaskError
except ImportError as error:
    raise MissingDependencyError(
        f"Ray is not installed ({error}). Run: pip install 'internlm2[ray]'"
    ) from error

_BATCHES_PER_WORKER = 2  # at a time: while one ends, the other keeps the engine full
_BATCH_SIZES = (64, 8, 1)  # questions; smaller ones after a worker died with them, to find the one that kills
_MAX_RESTARTS = 3
_RESTART_SECONDS = 0.5  # between two looks


class _Worker:
    """In the other process: a model that is made when it is first needed, also after a restart."""

    def __init__(self, build: Callable[[], LanguageModel], folder: str) -> None:
        with suppress(
            OSError
        ):  # relative paths mean the same as for the caller, where the machine has that folder
            os.chdir(folder)
        self._build = build
        self._lock = Lock()
        self._made: LanguageModel | None = None

    def describe(self) -> tuple[dict[str, str], bool]:
        model = self._model()
        return dict(model.description), model.counts_tokens

    def answer(self, requests: list[Request]) -> Iterator[tuple[str, Answer]]:
        for request, answer in self._model().answer(requests):
            yield request.key, answer

    def _model(self) -> LanguageModel:
        with self._lock:
            if self._made is None:
                self._made = self._build()
            return self._made


@dataclass
class _Batch:
    """Questions that a worker has. open: those without an answer yet, by key. is_alone: it is to have no others."""

    worker: int
    open: dict[str, Request]
    is_alone: bool


class RayModel:
    """A `LanguageModel` whose questions are answered by several equal ones; a context manager.

    build: makes the model in a worker; it is sent there, so it is a function of an installed package, or a partial of
    one. num_cpus, num_gpus: what each worker takes of the cluster. address: of the cluster; None: RAY_ADDRESS, one that
    runs on this machine, or a new one for this run.

    Raises EvalError where the cluster is too small or its workers differ, and what `build` raises.

    >>> with RayModel(partial(load, "demo"), num_workers=2) as model:
    ...     evaluate(model, parts, folder, settings)
    """

    def __init__(
        self,
        build: Callable[[], LanguageModel],
        *,
        num_workers: int,
        num_cpus: float = 1,
        num_gpus: float = 0,
        address: str | None = None,
    ) -> None:
        check(num_workers >= 1, "workers", num_workers, "at least 1")
        self._is_own = not ray.is_initialized()
        if self._is_own:
            ray.init(address=address, include_dashboard=False, logging_level=logging.WARNING)
        self._workers: dict[int, Any] = {}
        self._restarts: dict[Any, int] = {}  # calls that wait for workers to be there again
        try:
            _check_size(num_workers, num_cpus=num_cpus, num_gpus=num_gpus)
            remote: Any = ray.remote
            actor = remote(
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                max_restarts=_MAX_RESTARTS,
                max_concurrency=_BATCHES_PER_WORKER,
            )(_Worker)
            self._workers.update((n, actor.remote(build, str(Path.cwd()))) for n in range(num_workers))
            self.description, self.counts_tokens = self._describe()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, and the cluster if it was made for this run."""
        for worker in self._workers.values():
            ray.kill(worker)
        self._workers.clear()
        if self._is_own:
            ray.shutdown()

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer]]:
        """See `LanguageModel.answer`. A question with which workers die again and again gets an error."""
        waiting = iter(requests)
        returned: deque[Request] = deque()
        num_deaths: dict[str, int] = {}
        running: dict[Any, _Batch] = {}
        try:
            while True:
                self._deal(running, waiting, returned, num_deaths)
                if not running and not self._restarts:
                    return
                ready: Any = ray.wait([*running, *self._restarts], num_returns=1)[0][0]
                if ready in self._restarts:
                    self._look_after(ready)
                    continue
                batch = running[ready]
                try:
                    key, answer = _get(next(ready))
                except StopIteration:
                    assert not batch.open, "a worker left questions without an answer"
                    del running[ready]
                    continue
                except RayActorError as error:
                    del running[ready]
                    self._note_death(batch, error)
                    for request in batch.open.values():
                        num_deaths[request.key] = num_deaths.get(request.key, 0) + 1
                        if num_deaths[request.key] < len(_BATCH_SIZES):
                            returned.append(request)
                        else:
                            yield request, Answer(error=_deadly(request, num_deaths[request.key]))
                    continue
                yield batch.open.pop(key), answer
        finally:
            for stream in running:
                ray.cancel(stream)

    def _deal(
        self,
        running: dict[Any, _Batch],
        waiting: Iterator[Request],
        returned: deque[Request],
        num_deaths: Mapping[str, int],
    ) -> None:
        """Give batches to workers that have room, first what others could not finish."""
        for _ in range(_BATCHES_PER_WORKER):
            for number, worker in self._workers.items():
                if number in self._restarts.values():
                    continue
                own = [batch for batch in running.values() if batch.worker == number]
                deaths = num_deaths[returned[0].key] if returned else 0
                size = _BATCH_SIZES[deaths]
                is_alone = size == 1
                if own and (is_alone or len(own) >= _BATCHES_PER_WORKER or own[0].is_alone):
                    continue
                requests: list[Request] = []
                while returned and len(requests) < size and num_deaths[returned[0].key] == deaths:
                    requests.append(returned.popleft())
                requests = requests or list(islice(waiting, size))
                if requests:
                    stream = worker.answer.options(num_returns="streaming").remote(requests)
                    running[stream] = _Batch(number, {request.key: request for request in requests}, is_alone)

    def _note_death(self, batch: _Batch, error: RayActorError) -> None:
        logger.warning("Worker %d died; its %d open questions are dealt anew.", batch.worker, len(batch.open))
        if batch.worker in self._workers and batch.worker not in self._restarts.values():
            self._restart(batch.worker, error)

    def _restart(self, number: int, error: RayActorError) -> None:
        """Wait for a worker that Ray starts again, or do without it."""
        if not isinstance(error, ActorDiedError):
            self._restarts[self._workers[number].describe.remote()] = number
            return
        del self._workers[number]
        logger.warning("Worker %d does not come back; %d are left.", number, len(self._workers))
        if not self._workers:
            raise EvalError(
                f"All workers are gone; the last one said: {_last_line(error)}. What was answered is kept: look at the "
                "memory of the machines, and run the same command again to go on."
            ) from error

    def _look_after(self, ready: Any) -> None:
        """See whether a worker that was started again has its model."""
        number = self._restarts.pop(ready)
        try:
            _get(ready)
        except RayActorError as error:
            time.sleep(_RESTART_SECONDS)
            self._restart(number, error)

    def _describe(self) -> tuple[Mapping[str, str], bool]:
        try:
            found = [_get(worker.describe.remote()) for worker in self._workers.values()]
        except RayActorError as error:
            raise EvalError(
                f"A worker died while it loaded the model: {_last_line(error)}. Ask for fewer workers on each machine, "
                "or for more memory."
            ) from error
        for number, (description, _) in enumerate(found):
            for name in {**description, **found[0][0]}:
                ours, first = description.get(name), found[0][0].get(name)
                if ours != first:
                    raise EvalError(
                        f"The workers differ: {name} is {first!r} on the first and {ours!r} on worker {number}. "
                        "Give all machines the same model files, and the same kind of device (--device)."
                    )
        return found[0]


def _get(reference: Any) -> Any:
    """What a worker gave. What its own code raised is raised here as it was."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, InternLM2Error):
            raise error.cause from None
        raise


def _check_size(num_workers: int, *, num_cpus: float, num_gpus: float) -> None:
    there = ray.cluster_resources()
    for name, each in (("CPU", num_cpus), ("GPU", num_gpus)):
        if num_workers * each > there.get(name, 0):
            raise EvalError(
                f"{num_workers} workers need {num_workers * each:g} {name}s, but the Ray cluster has "
                f"{there.get(name, 0):g}. Ask for fewer workers, or add machines with `ray start --address=...`."
            )


def _deadly(request: Request, count: int) -> str:
    return (
        f"{request.key}: {count} workers died while they had this question, the last one with nothing else."
    )


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else type(error).__name__
