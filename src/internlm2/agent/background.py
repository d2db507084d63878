"""An event loop in a thread of its own, for callers that are not asynchronous, and plain functions as awaitables."""

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import TypeVar

T = TypeVar("T")
_CLOSE_SECONDS = 5.0
_POLL_SECONDS = 0.1


class BackgroundLoop:
    """An event loop that runs until `close`; its thread starts with the first call and never holds up the exit."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def submit(self, work: Coroutine[object, object, T]) -> "Future[T]":
        """Start `work` there."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name=self._name, daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(
        self, work: Coroutine[object, object, T], *, is_cancelled: Callable[[], bool] = lambda: False
    ) -> T:
        """Run `work` to its end. Ctrl-C and `is_cancelled` cancel it; then KeyboardInterrupt or CancelledError."""
        future = self.submit(work)
        try:
            while True:
                # Not one long wait: Ctrl-C has to get through, and somebody may have cancelled.
                try:
                    return future.result(_POLL_SECONDS)
                except TimeoutError:
                    if future.done():
                        raise
                    if is_cancelled():
                        raise CancelledError from None
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what runs and end the thread. Safe to call twice."""
        loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            return
        asyncio.run_coroutine_threadsafe(_cancel_rest(), loop)
        thread.join(_CLOSE_SECONDS)
        if not thread.is_alive():
            loop.close()


async def _cancel_rest() -> None:
    """Give the other tasks a moment to end, then stop the loop."""
    try:
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest, timeout=_CLOSE_SECONDS / 2)
    finally:
        asyncio.get_running_loop().stop()


def in_thread(work: Callable[[], T]) -> "asyncio.Future[T]":
    """`work` in a daemon thread, to be awaited. Unlike a pool's, the thread holds up nothing when it hangs.

    Whatever it raises is raised where it is awaited, as an Exception: SystemExit and KeyboardInterrupt of a tool
    concern nobody else.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: Exception | None) -> None:
        if future.done():  # nobody waits any more
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def body() -> None:
        result: T | None = None
        failure: Exception | None = None
        try:
            result = work()
        except StopIteration as error:  # which no future can hold
            failure = RuntimeError(f"StopIteration: {error}")
        except Exception as error:
            failure = error
        except BaseException as error:
            failure = RuntimeError(f"{type(error).__name__}: {error}")
        if not loop.is_closed():
            try:
                loop.call_soon_threadsafe(tell, result, failure)
            except RuntimeError:  # closed in between
                return

    threading.Thread(target=contextvars.copy_context().run, args=(body,), daemon=True).start()
    return future
