"""Coroutines that wait for requests: woken in their own event loops, and let go when they leave."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from internlm2.engine.frontend import Frontend, Job, Ticket
from internlm2.errors import RequestError

T = TypeVar("T")


class Waiter:
    """The requests of one coroutine, and how its event loop is woken from the thread that steps."""

    def __init__(self) -> None:
        self.tickets: list[Ticket] = []
        self.is_left = False
        self._loop = _running_loop()
        self._mail = asyncio.Event()
        self._failure: RequestError | None = None

    async def wait(self) -> None:
        """Until something has come. Raises what ended the requests from outside."""
        await self._mail.wait()
        self._mail.clear()
        if self._failure is not None:
            raise self._failure

    def wake(self) -> None:
        """From any thread. A loop that is closed has nobody left to wake."""
        try:
            self._loop.call_soon_threadsafe(self._mail.set)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def fail(self, error: RequestError) -> None:
        """End the wait with an exception."""
        self._failure = error
        self.wake()


class Waiters:
    """Who waits for requests to one frontend."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._waiters: set[Waiter] = set()
        self._is_closed = False

    def open(self, submit: Callable[[Callable[[], None]], list[Ticket]]) -> Waiter:
        """Queue requests for the running coroutine. Raises what `submit` raises."""
        waiter = self._begin()
        waiter.tickets = submit(waiter.wake)
        return self._enter(waiter)

    async def open_in_thread(self, submit: Callable[[Callable[[], None]], list[Ticket]]) -> Waiter:
        """As `open`, but `submit` runs in another thread."""
        waiter = self._begin()

        def work() -> None:
            waiter.tickets = submit(waiter.wake)
            if waiter.is_left:
                self.let_go(waiter)

        try:
            await asyncio.to_thread(work)
        except BaseException:
            waiter.is_left = True  # the thread cannot be stopped; what it brings is let go, here or there
            self.let_go(waiter)
            raise
        return self._enter(waiter)

    def _begin(self) -> Waiter:
        waiter = Waiter()
        if self._is_closed:
            raise RequestError("This AsyncLLM is closed. Make a new one; AsyncLLM.of(llm) is cheap.")
        return waiter

    def _enter(self, waiter: Waiter) -> Waiter:
        self._waiters.add(waiter)
        if self._is_closed:  # meanwhile, by another thread
            waiter.fail(_closed())
            self.let_go(waiter)
        return waiter

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
                ticket.raise_error()
        finally:
            self.let_go(waiter)
        return jobs[0].read()

    def let_go(self, waiter: Waiter) -> None:
        """Forget requests, finished or not. Safe anywhere, `__del__` included."""
        self._waiters.discard(waiter)
        for ticket in waiter.tickets:
            self._frontend.abort(ticket)

    def close(self) -> None:
        """End all waiting, and let no more begin."""
        self._is_closed = True
        for waiter in tuple(self._waiters):
            waiter.fail(_closed())
            self.let_go(waiter)


def _running_loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RequestError(
            "AsyncLLM answers coroutines only. Call it inside `async def`, or use LLM elsewhere."
        ) from None


def _closed() -> RequestError:
    return RequestError("AsyncLLM was closed before the answer was complete. Await answers before closing.")
