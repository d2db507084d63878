"""What can go wrong around the engine's thread: callbacks that raise, ends that come at the wrong moment, leaks."""

import asyncio
import gc
import os
import threading
import time
import weakref

import pytest
import torch

from internlm2 import LLM, AsyncLLM, SamplingParams
from internlm2.engine.engine_thread import EngineThread
from internlm2.errors import RequestError

PROMPT = [1, *range(60, 70)]
LONG = SamplingParams(max_tokens=150, ignore_eos=True)
SHORT = SamplingParams(max_tokens=3, ignore_eos=True)


@pytest.fixture
def llm(chat_folder):
    with LLM(chat_folder, dtype="float32", memory_gib=0.01, max_num_seqs=4) as llm:
        yield llm


def in_time(function, *arguments, seconds: float = 30.0):
    """The result of a call; a deadlock fails instead of hanging."""
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments)), daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it waits for ever"
    return results[0] if results else None


# -- callbacks ----------------------------------------------------------------------------------------------


def test_a_callback_that_raises_stops_nobody_else(llm, caplog):
    def bad() -> None:
        raise ValueError("no mail wanted")

    job = llm.begin_generate([PROMPT], SHORT, on_mail=bad)
    others = in_time(llm.generate, [PROMPT, PROMPT], LONG)
    assert others[0].token_ids[:3] == job.read()[0].token_ids
    assert "A callback for mail raised" in caplog.text


def test_an_error_between_two_additions_ends_all_of_the_call(llm, monkeypatch):
    add, calls = llm.frontend.engine.add, []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("no room in the book")
        add(*arguments, **options)

    monkeypatch.setattr(llm.frontend.engine, "add", failing)
    tickets = llm.frontend.submit([llm.frontend.prepare(PROMPT, LONG) for _ in range(4)])
    for ticket in tickets:
        with pytest.raises(OSError, match="no room in the book"):
            llm.frontend.wait([ticket])
    assert in_time(llm.generate, [PROMPT], SHORT)


def test_an_error_while_text_is_made_ends_the_others_of_the_step_too(llm, monkeypatch):
    real, calls = llm.frontend._deliver, []

    def failing(update):
        calls.append(update)
        if len(calls) == 6:
            raise OSError("no such letter")
        return real(update)

    monkeypatch.setattr(llm.frontend, "_deliver", failing)
    tickets = llm.frontend.submit([llm.frontend.prepare(PROMPT, LONG) for _ in range(3)])
    for ticket in tickets:
        with pytest.raises(OSError, match="no such letter"):
            llm.frontend.wait([ticket])
    assert in_time(llm.generate, [PROMPT], SHORT)


def test_a_failure_that_cannot_be_told_leaves_the_thread_alive(llm, monkeypatch, caplog):
    def fail(*arguments):
        raise OSError("again")

    with monkeypatch.context() as patch:
        patch.setattr(llm.frontend, "fail", fail)
        llm.frontend._thread.post(fail)
        llm.frontend.settle()
    assert "could not be told" in caplog.text
    assert in_time(llm.generate, [PROMPT], SHORT)


# -- the end ------------------------------------------------------------------------------------------------


def test_closing_twice_and_late_aborts_keep_nothing(chat_folder):
    llm = LLM(chat_folder, dtype="float32")
    stream = llm.stream(PROMPT, LONG)
    next(stream)
    for _ in range(3):
        llm.close()
    stream.close()
    kept = weakref.ref(llm.frontend), weakref.ref(llm.model)
    del llm, stream
    gc.collect()
    assert [each() for each in kept] == [None, None]


def test_a_request_that_comes_while_it_closes_is_refused_and_waits_for_nothing(llm, monkeypatch):
    frontend = llm.frontend
    monkeypatch.setattr(frontend, "_check_usable", lambda: time.sleep(0.3))  # was open when it looked
    errors: list[BaseException] = []

    def ask():
        try:
            llm.generate([PROMPT], LONG)
        except RequestError as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    time.sleep(0.05)
    llm.close()
    thread.join(30)
    assert not thread.is_alive(), "it waits for ever"
    assert "was closed" in str(errors[0])


def test_several_threads_may_close_at_once(chat_folder):
    llm = LLM(chat_folder, dtype="float32")
    llm.stream(PROMPT, LONG)
    threads = [threading.Thread(target=llm.close, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_an_interrupted_close_can_be_repeated_and_waits_for_the_step(llm, monkeypatch):
    forward, is_computing = llm.frontend.engine.runner.forward, threading.Event()

    def slow(batch):
        is_computing.set()
        time.sleep(0.5)
        return forward(batch)

    monkeypatch.setattr(llm.frontend.engine.runner, "forward", slow)
    llm.frontend.submit([llm.frontend.prepare(PROMPT, LONG)])
    is_computing.wait()
    gone = llm.frontend._thread._gone

    class Interrupted(type(gone)):
        def get(self, *arguments):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.frontend._thread, "_gone", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            llm.close()
    assert gone.empty()
    in_time(llm.close)
    assert not gone.empty()


def test_close_opens_what_is_held(llm):
    with llm.frontend.held():
        in_time(llm.close)


def test_an_interrupt_while_it_is_held_lets_it_go(llm, monkeypatch):
    post = EngineThread.post

    def interrupted(self, call):
        post(self, call)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EngineThread, "post", interrupted)
        with pytest.raises(KeyboardInterrupt), llm.frontend.held():
            pass
    assert in_time(llm.generate, [PROMPT], SHORT)


# -- who waits ----------------------------------------------------------------------------------------------


def test_several_threads_may_wait_for_one_request(llm):
    for _ in range(10):
        tickets = llm.frontend.submit([llm.frontend.prepare(PROMPT, SHORT)])
        threads = [threading.Thread(target=llm.frontend.wait, args=(tickets,), daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "it was not woken"


def test_an_error_is_a_copy_for_each_and_keeps_no_model(chat_folder, monkeypatch):
    llm = LLM(chat_folder, dtype="float32")

    def fail(batch):
        raise OSError("the disk is gone")

    monkeypatch.setattr(llm.frontend.engine.runner, "forward", fail)
    tickets = llm.frontend.submit([llm.frontend.prepare(PROMPT, SHORT)])
    errors = []
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone") as caught:
            llm.frontend.wait(tickets)
        errors.append(caught.value)
    assert errors[0] is not errors[1]
    kept = weakref.ref(llm.model)
    monkeypatch.undo()
    gc.disable()
    try:
        del errors, caught, tickets, llm
        deadline = time.monotonic() + 5
        while kept() is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        gc.collect()
        assert kept() is None
    finally:
        gc.enable()


@pytest.fixture
def threads_seen(llm, monkeypatch):
    """How many threads each forward pass computed with."""
    seen: list[int] = []
    forward = llm.frontend.engine.runner.forward

    def watched(batch):
        seen.append(torch.get_num_threads())
        return forward(batch)

    monkeypatch.setattr(llm.frontend.engine.runner, "forward", watched)
    before = torch.get_num_threads()
    yield seen
    torch.set_num_threads(before)


def test_the_thread_takes_over_how_many_threads_compute(llm, threads_seen):
    for number in (1, 2):
        torch.set_num_threads(number)
        threads_seen.clear()
        llm.generate([PROMPT], SamplingParams(max_tokens=2))
        assert set(threads_seen) == {number}


def test_only_the_thread_that_made_it_says_how_many_threads_compute(llm, threads_seen):
    def elsewhere():
        torch.set_num_threads(2)
        llm.generate([PROMPT], SHORT)

    torch.set_num_threads(1)
    llm.generate([PROMPT], SHORT)
    in_time(elsewhere)
    assert set(threads_seen) == {1}


def test_an_open_stream_that_is_cancelled_in_its_preparation_lets_go(llm, monkeypatch):
    begin, has_begun = llm.begin_stream, threading.Event()

    def slow(*arguments, **options):
        has_begun.set()
        time.sleep(0.3)
        return begin(*arguments, **options)

    monkeypatch.setattr(llm, "begin_stream", slow)

    async def main():
        task = asyncio.create_task(AsyncLLM.of(llm).open_stream(PROMPT, LONG))
        await asyncio.to_thread(has_begun.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    time.sleep(0.5)
    llm.frontend.settle()
    assert not llm.frontend._streams
    assert llm.frontend.engine.scheduler.pool.num_held == 0


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_cannot_read_its_parents_stream(llm):
    stream = llm.stream(PROMPT, LONG)
    next(stream)
    child = os.fork()
    if child == 0:
        try:
            for _ in stream:
                pass
        except RequestError:
            os._exit(7)
        os._exit(9)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (7, 9)  # 9: all pieces had come before the fork
