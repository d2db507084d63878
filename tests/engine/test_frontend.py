"""Tickets and the engine's thread: whatever interrupts a caller, its request goes and nobody else notices."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from internlm2 import LLM, SamplingParams
from internlm2.engine import frontend as frontend_module
from internlm2.engine.schedule.request import Task
from internlm2.errors import RequestError

PROMPT = [1, *range(60, 70)]
LONG = SamplingParams(max_tokens=150, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(chat_folder):
    return LLM(chat_folder, dtype="float32", memory_gib=0.01, max_num_seqs=4)


@pytest.fixture
def frontend(llm):
    return llm.frontend


def assert_nothing_stays(frontend):
    frontend.settle()
    assert not frontend._streams
    assert not frontend.engine.has_work
    assert not frontend.engine._live
    assert frontend.engine.scheduler.pool.num_held == 0


def start_python(script: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


# -- one caller is interrupted ------------------------------------------------------------------------------


def test_an_interrupt_between_two_samples_lets_all_of_them_go(frontend, monkeypatch):
    def interrupted(tokenizer, stop, *, sample):
        if sample == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(frontend_module, "TextStream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        frontend.prepare(PROMPT, SamplingParams(n=4, temperature=1.0))
    assert_nothing_stays(frontend)


@pytest.mark.parametrize("prepare", [
    lambda frontend: frontend.prepare(PROMPT, SamplingParams()),
    lambda frontend: frontend.prepare_task(PROMPT, Task.EMBED),
], ids=["answer", "task"])  # fmt: skip
def test_an_interrupt_before_or_after_requests_are_queued_lets_them_go(frontend, monkeypatch, prepare):
    post, is_first = frontend._thread.post, []

    for is_late in (False, True):

        def interrupted(call, is_late=is_late):
            if is_late or is_first:
                post(call)
            if not is_first:
                is_first.append(True)
                raise KeyboardInterrupt

        is_first.clear()
        with monkeypatch.context() as patch:
            patch.setattr(frontend._thread, "post", interrupted)
            with pytest.raises(KeyboardInterrupt):
                frontend.submit([prepare(frontend), prepare(frontend)])
        assert_nothing_stays(frontend)


def test_ctrl_c_in_one_thread_takes_nothing_from_the_others(chat_folder):
    script = """
        import sys, threading
        from internlm2 import LLM, SamplingParams

        llm = LLM(sys.argv[1], dtype="float32", memory_gib=0.01)
        params = SamplingParams(max_tokens=40, ignore_eos=True)
        prompts = [[1, 60 + i, 61, 62] for i in range(3)]
        expected = [out.token_ids for out in llm.generate(prompts, params)]
        left, wrong = threading.Event(), []

        def serve(number):
            while not left.is_set():
                found = [t for piece in llm.stream(prompts[number], params) for t in piece.token_ids]
                if found != expected[number]:
                    wrong.append(found)

        threads = [threading.Thread(target=serve, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        print("ready", flush=True)
        num_interrupts, is_told = 0, True
        while num_interrupts < 40 or not is_told:
            try:
                if not is_told:  # in here: the next signal comes as soon as it is read
                    print("again", flush=True)
                    is_told = True
                if num_interrupts < 40:
                    llm.generate(prompts, params)
                    for _ in llm.stream(prompts[0], params):
                        pass
            except KeyboardInterrupt:
                num_interrupts += 1
                is_told = False
        left.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "somebody waits for ever"
        assert not wrong, wrong
        llm.frontend.settle()
        llm.frontend.engine.scheduler.check_integrity()
        assert llm.frontend.engine.scheduler.pool.num_held == 0
        print("right", flush=True)
    """
    process = start_python(script, str(chat_folder))
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    try:
        assert next(lines) == "ready\n"
        for n in range(40):
            time.sleep(0.002 * (n % 7))
            process.send_signal(signal.SIGINT)
            assert next(lines) == "again\n"
        assert next(lines) == "right\n"
        assert process.wait(60) == 0
    finally:
        process.kill()


def test_a_stream_that_is_never_begun_lets_go(llm, frontend):
    stream = llm.stream(PROMPT, LONG)
    del stream
    gc.collect()
    assert_nothing_stays(frontend)


def test_a_closed_stream_is_over(llm, frontend):
    stream = llm.stream(PROMPT, LONG)
    next(stream)
    stream.close()
    assert list(stream) == []
    assert_nothing_stays(frontend)


def test_who_waits_for_a_request_that_another_thread_aborts_is_told(frontend):
    tickets = frontend.submit([frontend.prepare(PROMPT, LONG)])
    threading.Timer(0.05, lambda: frontend.abort(tickets[0])).start()
    with pytest.raises(RequestError, match="This request was aborted before its answer was complete"):
        frontend.wait(tickets)
    assert_nothing_stays(frontend)


# -- a step fails -------------------------------------------------------------------------------------------


def test_a_failing_step_ends_what_is_open_in_every_thread_and_the_next_request_works(
    llm, frontend, monkeypatch
):
    expected = llm.generate([PROMPT], LONG)

    def fail(batch):
        raise OSError("the disk of the keys is gone")

    errors: list[BaseException] = []

    def ask():
        try:
            llm.generate([PROMPT], LONG)
        except OSError as error:
            errors.append(error)

    with monkeypatch.context() as patch:
        patch.setattr(frontend.engine.runner, "forward", fail)
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        with pytest.raises(OSError, match="the disk of the keys is gone"):
            llm.generate([PROMPT], LONG)
    assert len(errors) == 3
    assert_nothing_stays(frontend)
    assert llm.generate([PROMPT], LONG) == expected


# -- the thread ---------------------------------------------------------------------------------------------


def engine_threads() -> int:
    return sum(thread.name == "internlm2-engine" for thread in threading.enumerate())


def test_a_model_that_nobody_uses_takes_its_thread_along(chat_folder):
    gc.collect()
    before = engine_threads()
    llm = LLM(chat_folder, dtype="float32")
    llm.generate([PROMPT], SamplingParams(max_tokens=2))
    assert engine_threads() == before + 1
    del llm
    gc.collect()
    assert engine_threads() == before


def test_close_ends_the_thread_and_tells_whoever_waits(chat_folder):
    before = engine_threads()
    with LLM(chat_folder, dtype="float32") as llm:
        stream = llm.stream(PROMPT, LONG)
        next(stream)
    assert engine_threads() == before
    with pytest.raises(RequestError, match="This model was closed"):
        list(stream)
    with pytest.raises(RequestError, match="This model was closed"):
        llm.generate([PROMPT])
    llm.close()


def test_requests_that_are_submitted_while_it_is_held_begin_together(llm, frontend):
    before = llm.stats.num_steps
    with frontend.held():
        tickets = [ticket for _ in range(4) for ticket in frontend.submit([frontend.prepare(PROMPT, LONG)])]
        time.sleep(0.05)
        assert llm.stats.num_steps == before
    frontend.wait(tickets)
    assert llm.stats.num_steps - before <= LONG.max_tokens + 1


def test_the_program_may_end_in_the_middle_of_an_answer(chat_folder):
    script = """
        import sys
        from internlm2 import LLM, SamplingParams

        llm = LLM(sys.argv[1], dtype="float32")
        next(llm.stream("Hello", SamplingParams(max_tokens=100_000 // 1000, ignore_eos=True)))
        print("bye")
    """
    process = start_python(script, str(chat_folder))
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "bye\n")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_is_told_to_load_its_own(llm):
    child = os.fork()
    if child == 0:
        try:
            llm.generate([PROMPT])
        except RequestError as error:
            os._exit(7 if "fork" in str(error) else 8)
        os._exit(9)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
