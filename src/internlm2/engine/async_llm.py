"""The asyncio twin of `LLM`: the same answers, awaited. One thread steps the engine for all coroutines.

The thread sleeps while there is nothing to do. Synchronous calls to the same LLM from other threads go on beside it;
whoever holds the engine serves everybody.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Concatenate, ParamSpec, Self, TypeVar

import torch

from internlm2.engine.frontend import Frontend, Job, Ticket
from internlm2.engine.llm import LLM, Message, Prompt
from internlm2.engine.sampling.params import SamplingParams
from internlm2.engine.sampling.sampler import TokenLogprobs
from internlm2.engine.text import Output, Piece, Score
from internlm2.errors import RequestError

T = TypeVar("T")
P = ParamSpec("P")


def _like_llm(
    _: Callable[Concatenate[LLM, P], None],
) -> Callable[[Callable[..., None]], Callable[Concatenate["AsyncLLM", P], None]]:
    """For type checkers: the decorated constructor takes the arguments of LLM, whatever they are."""
    return lambda function: function


class AsyncLLM:
    """A language model for coroutines. Arguments as of `LLM`; `AsyncLLM.of(llm)` wraps one that is loaded.

    Requests of all coroutines, event loops and threads run together. A task that is cancelled, and a loop over a
    stream that is left, let their request go. An exception of the engine reaches every request that is open; the next
    request starts afresh.

    >>> async with AsyncLLM("demo") as llm:
    ...     async for piece in llm.stream("The capital of France is"):
    ...         print(piece.text, end="")
    """

    @_like_llm(LLM.__init__)
    def __init__(self, *args: object, **options: object) -> None:
        self._wrap(LLM(*args, **options))  # pyrefly: ignore - `_like_llm` has checked them

    @classmethod
    def of(cls, llm: LLM) -> Self:
        """Around a model that is loaded already. Closing leaves `llm` in working order."""
        self = cls.__new__(cls)
        self._wrap(llm)
        return self

    def _wrap(self, llm: LLM) -> None:
        self.llm = llm
        self._driver = _Driver(llm.frontend)

    # -- answers ------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
    ) -> list[Output]:
        """Complete prompts together; as `LLM.generate`."""
        return await self._driver.run(
            lambda on_mail: self.llm.begin_generate(prompts, params, adapter=adapter, on_mail=on_mail)
        )

    async def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Message] | None = None,
        adapter: str | None = None,
    ) -> Output:
        """Answer a conversation; as `LLM.chat`."""
        ids = self.llm.tokenizer.apply_chat(messages, tools=tools)
        return (await self.generate([ids], params, adapter=adapter))[0]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> "PieceStream":
        """Complete one prompt, piece by piece; must be called inside a running event loop.

        Raises RequestError at once, before the first piece is asked for.
        """
        ids = self.llm.encode(prompt)
        submit = self.llm.frontend.submit
        waiter = self._driver.open(
            lambda on_mail: [submit(ids, params or SamplingParams(), adapter=adapter, on_mail=on_mail)]
        )
        return PieceStream(self._driver, waiter)

    async def open_stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> "PieceStream":
        """As `stream`, prepared in another thread: a large text or schema does not hold up the event loop."""

        def submit(on_mail: Callable[[], None]) -> list[Ticket]:
            ids = self.llm.encode(prompt)
            return [
                self.llm.frontend.submit(ids, params or SamplingParams(), adapter=adapter, on_mail=on_mail)
            ]

        return PieceStream(self._driver, await self._driver.open_in_thread(submit))

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Message] | None = None,
        adapter: str | None = None,
    ) -> "PieceStream":
        """As `chat`, piece by piece. Raises ChatError at once for malformed messages."""
        return self.stream(self.llm.tokenizer.apply_chat(messages, tools=tools), params, adapter=adapter)

    async def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[Prompt], *, adapter: str | None = None
    ) -> list[Score]:
        """Log-likelihood of each continuation after its prompt; as `LLM.score`."""
        return await self._driver.run(
            lambda on_mail: self.llm.begin_score(prompts, continuations, adapter=adapter, on_mail=on_mail)
        )

    async def embed(self, texts: Sequence[Prompt], *, adapter: str | None = None) -> torch.Tensor:
        """The mean of the last hidden states of each text, (texts, C) float32; as `LLM.embed`."""
        return await self._driver.run(
            lambda on_mail: self.llm.begin_embed(texts, adapter=adapter, on_mail=on_mail)
        )

    # -- the end ------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """End the thread; requests that are open raise RequestError. May be called twice.

        Without it the thread, and with it the model, stay until the program ends.
        """
        await asyncio.to_thread(self._driver.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class PieceStream:
    """The pieces of one request, for `async for`. Dropping it, or `await aclose()`, lets the request go."""

    def __init__(self, driver: "_Driver", waiter: "_Waiter") -> None:
        self._driver = driver
        self._waiter = waiter
        self._is_over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        if self._is_over:
            raise StopAsyncIteration
        (ticket,) = self._waiter.tickets
        try:
            while True:
                is_done = ticket.is_done  # first: what is there afterwards is all there is
                if ticket.pieces:
                    return ticket.pieces.popleft()
                if is_done:
                    break
                await self._waiter.wait()
            if ticket.error is not None:
                raise ticket.error
        except BaseException:
            self._let_go()
            raise
        self._let_go()
        raise StopAsyncIteration

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt that were computed before, for another request; known with the first piece."""
        return self._waiter.tickets[0].requests[0].num_cached

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs]:
        """One for each prompt id after the first, where asked for; complete when the stream is over."""
        found = [update.prompt_logprobs for update in self._waiter.tickets[0].last_updates]
        return [token for each in found if each is not None for token in each]

    async def aclose(self) -> None:
        """Let the request go before its end."""
        self._let_go()

    def __del__(self) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._driver.let_go(self._waiter)


class _Waiter:
    """The requests of one coroutine, and how its event loop is woken from the thread that steps."""

    def __init__(self) -> None:
        self.tickets: list[Ticket] = []
        self._loop = asyncio.get_running_loop()
        self._mail = asyncio.Event()
        self._failure: BaseException | None = None
        self._trace: TracebackType | None = None

    async def wait(self) -> None:
        """Until something has come. Raises what ended the requests from outside."""
        await self._mail.wait()
        self._mail.clear()
        if self._failure is not None:
            raise self._failure.with_traceback(self._trace)  # one exception, raised in many places

    def wake(self) -> None:
        """From any thread. A loop that is closed has nobody left to wake."""
        try:
            self._loop.call_soon_threadsafe(self._mail.set)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def fail(self, error: BaseException) -> None:
        """End the wait with an exception."""
        self._failure, self._trace = error, error.__traceback__
        self.wake()


class _Driver:
    """The thread that steps, and who waits for it. It begins with the first request."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        # NOTE: not an Event: `let_go` may run inside a garbage collection, where only this may be touched again.
        self._calls: SimpleQueue[None] = SimpleQueue()
        self._waiters: set[_Waiter] = set()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._lock = threading.Lock()  # beginning and end of the thread

    def open(self, submit: Callable[[Callable[[], None]], list[Ticket]]) -> _Waiter:
        """Queue requests for the running coroutine. Raises what `submit` raises."""
        waiter = self._begin()
        waiter.tickets = submit(waiter.wake)
        return self._enter(waiter)

    async def open_in_thread(self, submit: Callable[[Callable[[], None]], list[Ticket]]) -> _Waiter:
        """As `open`, but `submit` runs in another thread."""
        waiter = self._begin()
        task = asyncio.create_task(asyncio.to_thread(submit, waiter.wake))
        try:
            waiter.tickets = await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._forget)  # the thread cannot be stopped; what it brings is let go
            raise
        return self._enter(waiter)

    def _begin(self) -> _Waiter:
        waiter = _Waiter()
        with self._lock:
            if self._is_closed:
                raise RequestError("This AsyncLLM is closed. Make a new one; AsyncLLM.of(llm) is cheap.")
            if self._thread is None:
                self._thread = threading.Thread(target=self._drive, name="internlm2-engine", daemon=True)
                self._thread.start()
        return waiter

    def _enter(self, waiter: _Waiter) -> _Waiter:
        self._waiters.add(waiter)
        self._calls.put(None)
        if self._is_closed:  # meanwhile, by another thread
            waiter.fail(_closed())
        return waiter

    def _forget(self, task: "asyncio.Task[list[Ticket]]") -> None:
        if not task.cancelled() and task.exception() is None:
            for ticket in task.result():
                self._frontend.abort(ticket)
            self._calls.put(None)

    async def run(self, begin: Callable[[Callable[[], None]], Job[T]]) -> T:
        """Begin a job, wait for all its requests, and read the result."""
        jobs: list[Job[T]] = []

        def submit(on_mail: Callable[[], None]) -> list[Ticket]:
            jobs.append(begin(on_mail))
            return jobs[0].tickets

        waiter = self.open(submit)
        try:
            for ticket in waiter.tickets:
                while not ticket.is_done:
                    await waiter.wait()
                if ticket.error is not None:
                    raise ticket.error
        finally:
            self.let_go(waiter)
        return jobs[0].read()

    def let_go(self, waiter: _Waiter) -> None:
        """Forget requests, finished or not. Safe anywhere, `__del__` included."""
        self._waiters.discard(waiter)
        for ticket in waiter.tickets:
            self._frontend.abort(ticket)
        self._calls.put(None)  # somebody may be in a step: then it takes another one to notice

    def close(self) -> None:
        """End the thread and all waiting. Blocks until the current step is over."""
        with self._lock:
            self._is_closed = True
            thread, self._thread = self._thread, None
        if thread is not None:
            self._calls.put(None)
            thread.join()
        self._fail(_closed())

    def _drive(self) -> None:
        while not self._is_closed:
            self._calls.get()
            try:
                while not self._is_closed and self._frontend.step():
                    pass
            except BaseException as error:
                # To all who wait here. Synchronous callers go on stepping, and meet it themselves if it comes again.
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        for waiter in tuple(self._waiters):
            waiter.fail(error)
            self.let_go(waiter)


def _closed() -> RequestError:
    return RequestError("AsyncLLM was closed before the answer was complete. Await answers before closing.")
