"""Requests of many callers and threads over one engine: tickets, and what comes for them.

One thread computes (`engine_thread.py`); callers wait for mail. A caller that leaves early, by Ctrl-C too, lets its
request go; nothing it held stays behind, and nobody else notices.
"""

import copy
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Generic, Self, TypeVar

import torch

from internlm2.engine.admission import Admission
from internlm2.engine.core import Engine, Update
from internlm2.engine.engine_thread import CLOSED, EngineThread
from internlm2.engine.fork_guard import ForkGuard
from internlm2.engine.sampling.params import SamplingParams
from internlm2.engine.sampling.sampler import SamplingState
from internlm2.engine.schedule.request import Sequence as Request
from internlm2.engine.schedule.request import Task
from internlm2.engine.text import Piece, TextStream
from internlm2.errors import RequestError
from internlm2.tokenizer import Tokenizer

T = TypeVar("T")

_PROGRESS_SECONDS = 0.1  # how often a caller that wants to know looks how far its prompt is

_log = logging.getLogger(__name__)


class Ticket:
    """What a caller holds for its request: the sequences, and the mail that has come for them.

    on_mail: called when the ticket is done, and for a stream whenever pieces have come; in the thread of the engine, so
    it must not wait for anything. Without it, `wait` waits.
    """

    def __init__(
        self, requests: list[Request], on_mail: Callable[[], None] | None = None, *, is_stream: bool = False
    ) -> None:
        self.requests = requests
        self.pieces: deque[Piece] = deque()
        self.last_updates: list[Update] = []  # the finishing update of each sequence
        self.error: BaseException | None = None
        # NOTE: not an Event: Ctrl-C inside Event.wait can leave its lock in a state that another thread stumbles over.
        self._mail: SimpleQueue[None] = SimpleQueue()
        self.additions: deque[Callable[[], None]] = deque()  # what gives the sequences to the engine
        self._on_mail = on_mail
        self._is_stream = is_stream
        self._num_open = len(requests)

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come."""
        return self._num_open == 0

    def wait(self, seconds: float | None = None) -> None:
        """Sleep until there is mail, or for so long. Look first: mail that was read already does not wake again."""
        with suppress(Empty):
            self._mail.get(timeout=seconds)
        if self.is_done and self._mail.empty():
            self._mail.put(None)  # there may be others who wait

    def close_one(self, update: Update) -> None:
        """Note that one of the sequences is finished."""
        self.last_updates.append(update)
        self.error = self.error or update.error
        self._num_open -= 1

    def fail(self, error: BaseException) -> None:
        """End all of it with an exception."""
        if not self.is_done:
            self.error, self._num_open = error, 0
            self.notify()

    def notify(self) -> None:
        """Wake whoever waits, if there is something for them."""
        if not self.is_done and not self._is_stream:
            return
        if self._on_mail is not None:
            try:
                self._on_mail()
            except Exception:
                _log.exception("A callback for mail raised.")  # other callers go on
        elif self._mail.empty():
            self._mail.put(None)

    def raise_error(self) -> None:
        """Raise what ended it badly, if anything did."""
        if self.error is not None:
            raise _own(self.error)


def _own(error: BaseException) -> BaseException:
    """A copy for one caller: one exception that many callers raise would tell each of the others' frames."""
    try:
        own = copy.copy(error)
    except Exception:
        return error
    own.__cause__, own.__suppress_context__ = error.__cause__, error.__suppress_context__
    return own.with_traceback(error.__traceback__)


@dataclass(frozen=True)
class Job(Generic[T]):
    """Requests that make one result. read: the result, once all tickets are done."""

    tickets: list[Ticket]
    read: Callable[[], T]


class Pieces:
    """The pieces of one request, as they come. Leaving the loop, closing or dropping it lets the request go.

    on_progress: called while the prompt is read, with its computed tokens and all of them.
    """

    def __init__(
        self, frontend: "Frontend", ticket: Ticket, on_progress: Callable[[int, int], None] | None = None
    ) -> None:
        self._frontend = frontend
        self._ticket = ticket
        self._on_progress = on_progress
        self._num_reported = 0
        self._is_over = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        if self._is_over:
            raise StopIteration
        try:
            return self._next()
        except BaseException:
            self.close()
            raise

    def _next(self) -> Piece:
        ticket = self._ticket
        while True:
            is_done = ticket.is_done  # first: what is there afterwards is all there is
            if ticket.pieces:
                return ticket.pieces.popleft()
            if is_done:
                ticket.raise_error()
                raise StopIteration
            self._frontend.check_process()
            ticket.wait(None if self._on_progress is None else _PROGRESS_SECONDS)
            self._report()

    def _report(self) -> None:
        request = self._ticket.requests[0]
        num_computed = min(request.num_computed, request.num_prompt)
        if self._on_progress is not None and num_computed > self._num_reported:
            self._num_reported = num_computed
            self._on_progress(num_computed, request.num_prompt)

    def close(self) -> None:
        """Let the request go."""
        self._is_over = True
        self._frontend.abort(self._ticket)

    def __del__(self) -> None:
        self.close()


class Frontend:
    """Tickets over one engine; safe to call from any thread."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, admission: Admission) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self._admission = admission
        self._streams: dict[int, tuple[Ticket, TextStream | None]] = {}  # touched by the engine's thread only
        self._home = ForkGuard()
        self._gates: list[SimpleQueue[None]] = []
        self._maker = threading.get_ident()
        self._num_threads = torch.get_num_threads()  # of the maker's; each thread has a number of its own
        self._threads_set = 0
        self._thread = EngineThread(self)

    # -- taking requests ----------------------------------------------------------------------------------

    def prepare(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        adapter: str | None = None,
        on_mail: Callable[[], None] | None = None,
        is_stream: bool = False,
    ) -> Ticket:
        """A request for an answer to a prompt of ids, for `submit`. Raises RequestError for an impossible one.

        is_stream: whether its pieces are read as they come, or all at the end.
        """
        admitted = self._admission.generation(prompt, params, adapter=adapter)
        ticket = Ticket([request for request, _ in admitted], on_mail, is_stream=is_stream)
        with self._all_or_none([ticket]):
            for sample, (request, state) in enumerate(admitted):
                self._hold_adapter(request)
                stream = TextStream(self.tokenizer, params.stop, sample=sample)
                top = params.prompt_logprobs if sample == 0 else None
                ticket.additions.append(partial(self._add, request, ticket, stream, state, top))
        return ticket

    def prepare_task(
        self,
        prompt: Sequence[int],
        task: Task,
        *,
        logits_from: int = 0,
        top: int | None = None,
        alternatives: Sequence[int] = (),
        priority: int = 0,
        adapter: str | None = None,
        on_mail: Callable[[], None] | None = None,
    ) -> Ticket:
        """A request for what is read off a prompt, for `submit`; see `Sequence` for what may be wanted of it."""
        request = self._admission.reading(prompt, task, alternatives, priority=priority, adapter=adapter)
        request.logits_from = logits_from
        ticket = Ticket([request], on_mail)
        with self._all_or_none([ticket]):
            self._hold_adapter(request)
            ticket.additions.append(partial(self._add, request, ticket, None, None, top))
        return ticket

    def submit(self, prepared: Iterable[Ticket]) -> list[Ticket]:
        """Queue requests together, so that one step can begin with all; none when preparing one raises."""
        tickets: list[Ticket] = []
        with self._all_or_none(tickets):
            self._check_usable()
            for ticket in prepared:
                tickets.append(ticket)
            if threading.get_ident() == self._maker:
                self._num_threads = torch.get_num_threads()
            self._thread.post(partial(self._add_all, tickets))
            if self._thread.has_ended:  # meanwhile; nobody may look at what was posted
                raise RequestError(CLOSED)
        return tickets

    @contextmanager
    def held(self) -> Iterator[None]:
        """No step begins inside: requests that are submitted one by one begin together afterwards."""
        gate: SimpleQueue[None] = SimpleQueue()
        self._gates.append(gate)
        try:
            self._thread.post(gate.get)
            yield
        finally:
            gate.put(None)
            self._gates.remove(gate)

    def _check_usable(self) -> None:
        if self._thread.has_ended:
            raise RequestError(CLOSED)
        self.check_process()

    def check_process(self) -> None:
        """Raise RequestError in a forked child, which has no thread that computes."""
        self._home.check()

    def abort(self, ticket: Ticket) -> None:
        """Let a request go, before the next step; whoever else waits for it gets a RequestError. From anywhere."""
        if not ticket.is_done:
            # NOTE: no globals; at the end of the program they may be gone.
            self._thread.post(lambda: self._abort(ticket))

    @contextmanager
    def _all_or_none(self, tickets: list[Ticket]) -> Iterator[None]:
        """Let go of all when one cannot be queued, as when Ctrl-C comes in between."""
        try:
            yield
        except BaseException:
            for ticket in tickets:
                self.abort(ticket)
            raise

    def _hold_adapter(self, request: Request) -> None:
        if request.adapter is not None:
            adapters = self.engine.runner.adapters
            assert adapters is not None
            number = adapters.hold(request.adapter, request.sequence_id)
            # Keys are shared within one adapter, not within a name, which may be another adapter's later.
            request.namespace = (number, request.namespace)

    # -- waiting ------------------------------------------------------------------------------------------

    def wait(self, tickets: Sequence[Ticket]) -> None:
        """Until all tickets are done; on the way out, whatever the reason, none is left in the engine."""
        try:
            self.check_process()
            for ticket in tickets:
                while not ticket.is_done:
                    ticket.wait()
                ticket.raise_error()
        finally:
            for ticket in tickets:
                self.abort(ticket)

    def finish(self, job: Job[T]) -> T:
        """Wait for all of a job, and read its result."""
        self.wait(job.tickets)
        return job.read()

    def settle(self) -> None:
        """Wait until every abort so far has taken effect."""
        self._thread.settle()

    def close(self) -> None:
        """End the thread; requests that are open raise RequestError. A second call does nothing."""
        self._thread.has_ended = True
        for gate in tuple(self._gates):
            gate.put(None)
        self._thread.end()

    # -- in the thread of the engine ----------------------------------------------------------------------

    def step(self) -> bool:
        """Compute one step and hand out what it brings; False when there is nothing to do."""
        if not self.engine.has_work:
            return False
        tickets: dict[Ticket, None] = {}
        try:
            for update in self.engine.step():
                tickets[self._deliver(update)] = None
        finally:
            for ticket in tickets:
                ticket.notify()
        return True

    def fail(self, error: BaseException) -> None:
        """End every request: whose fault it was that a step raised is not known. The next request starts afresh."""
        for ticket in dict.fromkeys(ticket for ticket, _ in self._streams.values()):
            self._end(ticket, error)

    def _add_all(self, tickets: Iterable[Ticket]) -> None:
        if self._num_threads != self._threads_set:
            self._threads_set = self._num_threads
            torch.set_num_threads(self._threads_set)
        try:
            for ticket in tickets:
                while ticket.additions:
                    ticket.additions.popleft()()
        except BaseException as error:
            for ticket in tickets:
                self._end(ticket, error)
            raise

    def _add(
        self,
        request: Request,
        ticket: Ticket,
        stream: TextStream | None,
        state: SamplingState | None,
        top: int | None,
    ) -> None:
        self._streams[request.sequence_id] = (ticket, stream)
        self.engine.add(request, state, top=top)

    def _abort(self, ticket: Ticket) -> None:
        self._end(ticket, RequestError("This request was aborted before its answer was complete."))

    def _end(self, ticket: Ticket, error: BaseException) -> None:
        ticket.additions.clear()
        for request in ticket.requests:
            self.engine.finish(request)
            self._close(request)
        ticket.fail(error)

    def _close(self, request: Request) -> None:
        self._streams.pop(request.sequence_id, None)
        adapters = self.engine.runner.adapters
        if adapters is not None and request.adapter is not None:
            adapters.release(request.adapter, request.sequence_id)

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
