"""Requests of many callers and threads over one engine: tickets, and who steps when.

Whoever waits for an answer drives the engine, one thread at a time, and hands every caller what a step brought. A
caller that leaves early aborts its request; nothing it held stays behind.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

from internlm2.engine.admission import Admission
from internlm2.engine.core import Engine, Update
from internlm2.engine.sampling.params import SamplingParams
from internlm2.engine.schedule.request import Sequence as Request
from internlm2.engine.schedule.request import Task
from internlm2.engine.text import Piece, TextStream
from internlm2.errors import InternLM2Error
from internlm2.tokenizer import Tokenizer

T = TypeVar("T")

_WAIT_SECONDS = 0.05  # how long a caller sleeps while another one steps


class Ticket:
    """What a caller holds for its request: the sequences, and the mail that has come for them.

    on_mail: called, in the thread that steps, whenever something has come.
    """

    def __init__(self, requests: list[Request], on_mail: Callable[[], None] | None = None) -> None:
        self.requests = requests
        self.pieces: deque[Piece] = deque()
        self.last_updates: list[Update] = []  # the finishing update of each sequence
        self.error: InternLM2Error | None = None
        self.has_mail = threading.Event()
        self._on_mail = on_mail
        self._num_open = len(requests)

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come."""
        return self._num_open == 0

    def close_one(self, update: Update) -> None:
        """Note that one of the sequences is finished."""
        self.last_updates.append(update)
        self.error = self.error or update.error
        self._num_open -= 1

    def notify(self) -> None:
        """Wake whoever waits."""
        self.has_mail.set()
        if self._on_mail is not None:
            self._on_mail()


@dataclass(frozen=True)
class Job(Generic[T]):
    """Requests that make one result. read: the result, once all tickets are done."""

    tickets: list[Ticket]
    read: Callable[[], T]


class Frontend:
    """Tickets over one engine; safe to call from any thread."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, admission: Admission) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self._admission = admission
        self._lock = threading.Lock()
        self._inbox: deque[Callable[[], None]] = deque()
        self._streams: dict[int, tuple[Ticket, TextStream | None]] = {}

    # -- taking requests ----------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        adapter: str | None = None,
        on_mail: Callable[[], None] | None = None,
    ) -> Ticket:
        """Queue a prompt of ids. Raises RequestError for one that cannot be answered."""
        admitted = self._admission.generation(prompt, params, adapter=adapter)
        ticket = Ticket([request for request, _ in admitted], on_mail)
        with self._all_or_none(ticket):
            for sample, (request, state) in enumerate(admitted):
                self._open(request, ticket, TextStream(self.tokenizer, params.stop, sample=sample))
                top = params.prompt_logprobs if sample == 0 else None
                self._inbox.append(partial(self.engine.add, request, state, top=top))
        return ticket

    def submit_task(
        self,
        prompt: Sequence[int],
        task: Task,
        *,
        logits_from: int = 0,
        top: int | None = None,
        priority: int = 0,
        adapter: str | None = None,
        on_mail: Callable[[], None] | None = None,
    ) -> Ticket:
        """Queue a prompt from which something is read off. logits_from: the first position that matters."""
        request = self._admission.reading(prompt, task, priority=priority, adapter=adapter)
        request.logits_from = logits_from
        ticket = Ticket([request], on_mail)
        with self._all_or_none(ticket):
            self._open(request, ticket, None)
            self._inbox.append(partial(self.engine.add, request, top=top))
        return ticket

    def take_all(self, submissions: Iterable[Ticket]) -> list[Ticket]:
        """Submit as `submissions` is gone through: all, or none when one is refused."""
        tickets: list[Ticket] = []
        try:
            for ticket in submissions:
                tickets.append(ticket)
        except BaseException:
            for ticket in tickets:
                self.abort(ticket)
            raise
        return tickets

    def abort(self, ticket: Ticket) -> None:
        """Let a request go; finished ones are ignored. Takes effect before the next step."""

        def drop() -> None:
            for request in ticket.requests:
                self.engine.finish(request)
                self._close(request)

        if not ticket.is_done:
            self._inbox.append(drop)
            self._take_inbox_unless_stepping()

    @contextmanager
    def _all_or_none(self, ticket: Ticket) -> Iterator[None]:
        """Let go of all samples when one cannot be queued, as when Ctrl-C comes in between."""
        try:
            yield
        except BaseException:
            self.abort(ticket)
            raise

    def _open(self, request: Request, ticket: Ticket, stream: TextStream | None) -> None:
        if request.adapter is not None:
            adapters = self.engine.runner.adapters
            assert adapters is not None
            number = adapters.hold(request.adapter, request.sequence_id)
            # Keys are shared within one adapter, not within a name, which may be another adapter's later.
            request.namespace = (number, request.namespace)
        self._streams[request.sequence_id] = (ticket, stream)

    def _close(self, request: Request) -> None:
        self._streams.pop(request.sequence_id, None)
        adapters = self.engine.runner.adapters
        if adapters is not None and request.adapter is not None:
            adapters.release(request.adapter, request.sequence_id)

    # -- stepping -----------------------------------------------------------------------------------------

    def stream(
        self, ticket: Ticket, on_progress: Callable[[int, int], None] | None = None
    ) -> Iterator[Piece]:
        """The pieces of a request as they come, stepping the engine meanwhile. Raises what ended it badly.

        on_progress: called after each step with the prompt's computed tokens and all of them.
        """
        request = ticket.requests[0]
        try:
            while True:
                ticket.has_mail.clear()
                is_done = ticket.is_done  # first: another thread may add the last piece right after the loop
                while ticket.pieces:
                    yield ticket.pieces.popleft()
                if is_done:
                    if ticket.error is not None:
                        raise ticket.error
                    return
                self._step_or_wait(ticket)
                if on_progress is not None and request.num_outputs == 0:
                    on_progress(min(request.num_computed, request.num_prompt), request.num_prompt)
        finally:
            self.abort(ticket)

    def wait(self, tickets: Sequence[Ticket]) -> None:
        """Step until all tickets are done; on the way out, whatever the reason, none is left in the engine."""
        try:
            for ticket in tickets:
                while not ticket.is_done:
                    ticket.has_mail.clear()
                    if not ticket.is_done:
                        self._step_or_wait(ticket)
                if ticket.error is not None:
                    raise ticket.error
        finally:
            for ticket in tickets:
                self.abort(ticket)

    def finish(self, job: Job[T]) -> T:
        """Wait for all of a job, and read its result."""
        self.wait(job.tickets)
        return job.read()

    def step(self) -> bool:
        """Take what has come in and compute one step; False when there is nothing to do."""
        self._lock.acquire()
        try:
            return self._step()
        finally:
            self._release()

    def _step_or_wait(self, ticket: Ticket) -> None:
        if not self._lock.acquire(blocking=False):
            ticket.has_mail.wait(_WAIT_SECONDS)
            return
        try:
            # Another thread may have stepped since: then there is mail, or nothing more to come.
            if not ticket.is_done and not ticket.has_mail.is_set():
                self._step()
        finally:
            self._release()

    def _release(self) -> None:
        """Let others step. An abort that came during this step does not wait for a next one."""
        self._lock.release()
        self._take_inbox_unless_stepping()

    def _take_inbox_unless_stepping(self) -> None:
        """Do now what need not wait for a next step, that may never be; whoever steps does it afterwards."""
        while self._inbox and self._lock.acquire(blocking=False):
            try:
                self._take_inbox()
            finally:
                self._lock.release()

    def _step(self) -> bool:
        self._take_inbox()
        if not self.engine.has_work:
            return False
        tickets = [self._deliver(update) for update in self.engine.step()]
        for ticket in dict.fromkeys(tickets):
            ticket.notify()
        return True

    def _take_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _deliver(self, update: Update) -> Ticket:
        ticket, stream = self._streams[update.sequence.sequence_id]
        is_over = update.finish_reason is not None
        if stream is not None:
            piece = stream.push(update)
            ticket.pieces.append(piece)
            if piece.finish_reason == "stop" and not is_over:  # a stop string
                update = replace(update, prompt_logprobs=self.engine.prompt_logprobs(update.sequence))
                self.engine.finish(update.sequence)
                is_over = True
        if is_over:
            self._close(update.sequence)
            ticket.close_one(update)
        return ticket
