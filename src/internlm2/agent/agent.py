"""The loop: the model speaks, tools are run, the model reads what they brought, until it answers or a limit is met."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from internlm2.agent.background import in_thread
from internlm2.agent.calling import CallResult, Executor, ToolRunner
from internlm2.agent.dialects.choose import DialectName, choose
from internlm2.agent.dialects.dialect import Move
from internlm2.agent.limits import Limits
from internlm2.agent.model import Ask, ContextFullError, Message, Model, ToolCall
from internlm2.agent.record.events import Event, Listener, reply_event, result_event, start_event
from internlm2.agent.run import Outcome, Run
from internlm2.agent.tool_type import Tool, check_names

_PATIENCE_SECONDS = 10.0  # for a model or a tool to notice that nobody waits any more


@dataclass(frozen=True)
class Agent:
    """A model with tools and limits.

    dialect: "native" (the model's own calls), "react" (text), "interpreter" (code only); "auto": native where the model
    can. system: what it is told first. constrain: arguments must obey the schemas (our engine and servers that can).
    Raises ToolDefinitionError for tools of the same name, RequestError for a dialect that the model cannot do.

    >>> Agent(model, [calculator()]).run("What is 3 to the power of 40?").answer
    """

    model: Model
    tools: Sequence[Tool] = ()
    dialect: DialectName = "auto"
    system: str | None = None
    limits: Limits = field(default_factory=Limits)
    constrain: bool = False

    def __post_init__(self) -> None:
        check_names(self.tools)
        choose(self.dialect, self.model, self.tools)

    def run(self, question: str, *, listeners: Sequence[Listener] = ()) -> Outcome:
        """Answer one question. Ctrl-C ends it and raises KeyboardInterrupt."""
        with self.session(listeners=listeners) as session:
            return session.ask(question)

    async def run_async(self, question: str, *, listeners: Sequence[Listener] = ()) -> Outcome:
        """As `run`, for programs with an event loop, which goes on meanwhile. Cancelling the task ends the run."""
        with self.session(listeners=listeners) as session:
            return await session.ask_async(question)

    def session(self, *, listeners: Sequence[Listener] = (), executor: Executor | None = None) -> "Session":
        """A conversation of several questions. listeners: get every event. executor: in place of the tools."""
        return Session(self, listeners, executor)


class Session:
    """A conversation with an agent; use it in a `with` block, or call `close`. One question at a time."""

    def __init__(self, agent: Agent, listeners: Sequence[Listener], executor: Executor | None) -> None:
        self._agent = agent
        self._listeners = listeners
        self._dialect = choose(agent.dialect, agent.model, agent.tools)
        self._executor = executor or ToolRunner(
            agent.tools, agent.limits, breaks_markers=not agent.model.keeps_text_plain
        )
        system = self._dialect.system(agent.system, agent.tools)
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._num_calls = 0
        self._started = time.monotonic()
        self._is_cancelled = False
        self._tell(
            start_event(
                model=agent.model.name,
                calls_tools=agent.model.calls_tools,
                dialect=self._dialect.name,
                system=agent.system,
                tools=agent.tools,
                limits=agent.limits,
                constrain=agent.constrain,
            )
        )

    def ask(self, question: str) -> Outcome:
        """Answer a question, knowing what was said before. Ctrl-C ends it, raises KeyboardInterrupt, and the
        conversation is as it was before the question.
        """
        self._is_cancelled = False
        return self._ask(question)

    def _ask(self, question: str) -> Outcome:
        run = Run(self._agent.limits, [*self.messages, {"role": "user", "content": question}])
        self._tell({"event": "question", "text": question})
        try:
            outcome = self._answer(run)
        except (CancelledError, _CancelledError):
            outcome = run.outcome("cancelled")
        except KeyboardInterrupt:
            self._tell({"event": "end", "ending": "interrupted", **run.counts()})
            raise
        except BaseException as error:
            self._tell({"event": "end", "ending": "error", "error": str(error), **run.counts()})
            raise
        if outcome.ending != "cancelled":
            self.messages = run.messages
        self._tell({"event": "end", "ending": outcome.ending, "answer": outcome.answer, **run.counts()})
        return outcome

    async def ask_async(self, question: str) -> Outcome:
        """As `ask`, in a thread of its own; listeners are called there. When the task is cancelled, the question ends,
        and the conversation is as it was before it.
        """
        self._is_cancelled = False  # here, since the thread may begin after `cancel`
        work = in_thread(lambda: self._ask(question))
        work.add_done_callback(
            lambda done: done.cancelled() or done.exception()
        )  # the waiting may be over by then
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            self.cancel()
            await asyncio.wait([work], timeout=_PATIENCE_SECONDS)
            raise

    def cancel(self) -> None:
        """End the question that is being answered, from another thread; its outcome is "cancelled"."""
        self._is_cancelled = True

    def close(self) -> None:
        """Let go of threads. Tools are closed by who made them."""
        self._executor.close()

    def _answer(self, run: Run) -> Outcome:
        while (ending := run.limit_met()) is None:
            try:
                move = self._next_move(run)
            except ContextFullError:
                return run.outcome("context")
            if move.answer is not None:
                return run.outcome("cut" if run.is_cut else "answered")
            run.messages.extend(self._carry_out(run, move))
            if run.num_refused >= self._agent.limits.same_failures:
                return run.outcome("repeats")
        return run.outcome(ending)

    def _next_move(self, run: Run) -> Move:
        agent = self._agent
        run.turns += 1
        started = time.monotonic()
        ask = Ask(
            list(run.messages),
            agent.tools,
            constrain=agent.constrain,
            deadline=run.deadline,
            is_cancelled=lambda: self._is_cancelled,
        )
        reply = self._dialect.respond(agent.model, ask)
        self._check_cancelled()
        self._tell(reply_event(run.turns, reply, time.monotonic() - started))
        run.count(reply)
        move = self._dialect.read(reply, agent.tools, self._num_calls)
        self._num_calls += len(move.calls)
        run.messages.append(move.message)
        run.last_words = move.answer if move.answer is not None else str(move.message["content"])
        return move

    def _carry_out(self, run: Run, move: Move) -> list[Message]:
        """Run the calls of a move; what the model has to read next."""
        told: list[Message] = []
        if move.calls:
            results = self._results(run, move.calls)
            for result in results:
                run.note(result)
                self._tell(result_event(run.turns, result))
            told = self._dialect.results(results)
        if move.problem is not None:
            run.note_problem(str(move.message["content"]))
            told += self._dialect.problem(move.problem)
        return told

    def _results(self, run: Run, calls: Sequence[ToolCall]) -> list[CallResult]:
        refused = {call.id: why for n, call in enumerate(calls) if (why := run.refusal(call, n))}
        open_calls = [call for call in calls if call.id not in refused]
        done = (
            self._executor.run_all(open_calls, deadline=run.deadline, is_cancelled=lambda: self._is_cancelled)
            if open_calls
            else []
        )
        by_id = {result.call.id: result for result in done}
        return [
            by_id.get(call.id) or CallResult(call, "refused", refused.get(call.id, "There is no result."))
            for call in calls
        ]

    def _check_cancelled(self) -> None:
        if self._is_cancelled:
            raise _CancelledError

    def _tell(self, event: Event) -> None:
        timed = {**event, "seconds": round(time.monotonic() - self._started, 4)}
        for listener in self._listeners:
            listener(timed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _CancelledError(Exception):
    """`Session.cancel` was called."""
