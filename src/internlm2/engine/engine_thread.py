"""The one thread that computes. It takes calls from any thread, and steps its owner as long as there is work.

No signal reaches it, so Ctrl-C stops a caller that waits, never a step: what others asked for is neither lost nor done
twice. It holds no reference to its owner while it waits, so an engine that nobody uses any more goes away, and its
thread with it; at the end of the program the step that is running is finished first.
"""

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Protocol

from internlm2.engine.fork_guard import ForkGuard
from internlm2.errors import RequestError

CLOSED = "This model was closed. Load it again."

Call = Callable[[], None]

_log = logging.getLogger(__name__)


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
    """Calls and steps of `owner`, one after the other.

    has_ended: whether the end was asked for; calls that are posted afterwards may never be done.
    """

    def __init__(self, owner: Owner) -> None:
        # NOTE: queues that may be entered again: `post` may run inside a garbage collection, in a thread that is here.
        self._calls: SimpleQueue[Call] = SimpleQueue()
        self._gone: SimpleQueue[None] = SimpleQueue()  # has an item once the thread has left its loop
        self.has_ended = False
        self._home = ForkGuard()
        arguments = (weakref.ref(owner), self._calls, self._gone)
        self._thread = threading.Thread(target=_run, args=arguments, name="internlm2-engine", daemon=True)
        try:
            self._thread.start()
        except BaseException:  # Ctrl-C: nobody else would end it
            self.post(_end)
            raise
        # At the end of the program, if not before.
        self._finalizer = weakref.finalize(owner, self._end_for_certain)

    def post(self, call: Call) -> None:
        """Let the thread do `call` before its next step. From anywhere, `__del__` included."""
        self._calls.put(call)

    def settle(self) -> None:
        """Wait until all calls that were posted are done; steps may go on."""
        if self._is_elsewhere:
            return
        done: SimpleQueue[None] = SimpleQueue()
        self.post(lambda: done.put(None))
        while self._gone.empty():
            try:
                done.get(timeout=0.1)
            except Empty:
                continue
            return

    def end(self) -> None:
        """Let the thread finish its step, fail what is open, and end. May be called again, by several threads."""
        self.has_ended = True
        self.post(_end)
        if self._is_elsewhere:
            return
        # NOTE: not Thread.join: Ctrl-C in it makes Python 3.11 take a thread that runs for one that has ended.
        self._gone.get()
        self._gone.put(None)
        self._finalizer.detach()  # which would keep the calls that came too late, and what they hold

    @property
    def _is_elsewhere(self) -> bool:
        """Whether there is nothing to wait for: this is the thread itself, or a forked child, which has none."""
        return self._thread is threading.current_thread() or not self._home.is_at_home

    def _end_for_certain(self) -> None:
        while True:  # whatever the user presses
            try:
                return self.end()
            except KeyboardInterrupt:
                continue


def _end() -> None:
    raise _EndedError


_running: "dict[SimpleQueue[None], SimpleQueue[Call]]" = {}  # `gone` and `calls` of threads that are there


@atexit.register
def _end_all() -> None:
    """A thread that computes while the interpreter is taken down may crash it, also one whose owner is gone already."""
    for gone, calls in tuple(_running.items()):
        calls.put(_end)
        gone.get()
        gone.put(None)


os.register_at_fork(after_in_child=_running.clear)


def _run(
    owner_reference: "weakref.ref[Owner]", calls: "SimpleQueue[Call]", gone: "SimpleQueue[None]"
) -> None:
    _running[gone] = calls
    try:
        _loop(owner_reference, calls)
    finally:
        del _running[gone]
        gone.put(None)  # last: nothing of the owner is left on this thread


def _loop(owner_reference: "weakref.ref[Owner]", calls: "SimpleQueue[Call]") -> None:
    while True:
        ready = [calls.get()]
        owner = owner_reference()
        if owner is None:
            return
        try:
            _work(owner, ready, calls)
        except _EndedError:
            _fail(owner, RequestError(CLOSED))
            return
        del owner  # nothing is held while it waits


def _work(owner: Owner, ready: list[Call], calls: "SimpleQueue[Call]") -> None:
    """Do what has been asked, and step until there is no work. Raises _EndedError when the end was asked for."""
    while True:
        try:
            while ready:
                ready.pop()()
                _fetch(ready, calls)
            if not owner.step():
                return
        except _EndedError:
            raise
        except BaseException as error:
            _fail(owner, error)
        _fetch(ready, calls)


def _fetch(ready: list[Call], calls: "SimpleQueue[Call]") -> None:
    with suppress(Empty):
        ready.append(calls.get_nowait())


def _fail(owner: Owner, error: BaseException) -> None:
    try:
        owner.fail(error)
    except Exception:
        _log.exception("Requests could not be told that a step failed.")  # the thread goes on for the others
