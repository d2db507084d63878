"""The one thread that computes. It takes calls from any thread, and steps its owner as long as there is work.

No signal reaches it, so Ctrl-C stops a caller that waits, never a step: what others asked for is neither lost nor done
twice. It holds no reference to its owner while it waits, so an engine that nobody uses any more goes away, and its
thread with it; at the end of the program the step that is running is finished first.
"""

import threading
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Protocol

Call = Callable[[], None]


class Owner(Protocol):
    """What is stepped."""

    def step(self) -> bool:
        """Do some work; False when there is none."""
        ...

    def fail(self, error: BaseException) -> None:
        """A call or a step raised this. What is open must end."""
        ...


class _EndedError(Exception):
    """Leaves the loop of the thread."""


class EngineThread:
    """Calls and steps of `owner`, one after the other."""

    def __init__(self, owner: Owner) -> None:
        # NOTE: a queue that may be entered again: `post` may run inside a garbage collection, in a thread that is here.
        self._calls: SimpleQueue[Call] = SimpleQueue()
        arguments = (weakref.ref(owner), self._calls)
        self._thread = threading.Thread(target=_run, args=arguments, name="internlm2-engine", daemon=True)
        self._thread.start()
        weakref.finalize(owner, self.end)  # at the end of the interpreter, if not before

    def post(self, call: Call) -> None:
        """Let the thread do `call` before its next step. From anywhere, `__del__` included."""
        self._calls.put(call)

    def settle(self) -> None:
        """Wait until all calls that were posted are done; steps may go on."""
        done: SimpleQueue[None] = SimpleQueue()
        self.post(lambda: done.put(None))
        while self._thread.is_alive():
            try:
                done.get(timeout=0.1)
            except Empty:
                continue
            return

    def end(self) -> None:
        """Let the thread finish its step and end. Calls that are posted later are not done."""
        self.post(_end)
        if self._thread is not threading.current_thread():
            self._thread.join()


def _end() -> None:
    raise _EndedError


def _run(owner_reference: "weakref.ref[Owner]", calls: "SimpleQueue[Call]") -> None:
    while True:
        call = calls.get()
        owner = owner_reference()
        if owner is None:
            return
        try:
            _work(owner, call, calls)
        except _EndedError:
            return
        del owner, call  # nothing is held while it waits


def _work(owner: Owner, call: Call | None, calls: "SimpleQueue[Call]") -> None:
    """Do what has been asked, and step until there is no work. Raises _EndedError when the end was asked for."""
    while True:
        try:
            while call is not None:
                call()
                call = _next(calls)
            if not owner.step():
                return
        except _EndedError:
            raise
        except BaseException as error:
            owner.fail(error)
        call = _next(calls)


def _next(calls: "SimpleQueue[Call]") -> Call | None:
    try:
        return calls.get_nowait()
    except Empty:
        return None
