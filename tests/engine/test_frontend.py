"""Tickets: whatever interrupts a caller, nothing of its request stays behind."""

import pytest

from internlm2 import LLM, SamplingParams
from internlm2.engine import frontend as frontend_module
from internlm2.engine.schedule.request import Task

PROMPT = [1, *range(60, 70)]


@pytest.fixture(scope="module")
def frontend(chat_folder):
    return LLM(chat_folder, dtype="float32", memory_gib=0.01, max_num_seqs=4).frontend


def assert_nothing_stays(frontend):
    assert not frontend._streams
    assert not frontend._inbox
    assert not frontend.engine.has_work
    assert not frontend.engine._live
    assert frontend.engine.scheduler.pool.num_held == 0


def test_an_interrupt_between_two_samples_lets_all_of_them_go(frontend, monkeypatch):
    def interrupted(tokenizer, stop, *, sample):
        if sample == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(frontend_module, "TextStream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        frontend.submit(PROMPT, SamplingParams(n=4, temperature=1.0))
    assert_nothing_stays(frontend)


@pytest.mark.parametrize("submit", [
    lambda frontend: frontend.submit(PROMPT, SamplingParams()),
    lambda frontend: frontend.submit_task(PROMPT, Task.EMBED),
], ids=["answer", "task"])  # fmt: skip
def test_an_interrupt_before_a_request_is_queued_leaves_no_stream(frontend, monkeypatch, submit):
    class Interrupted(type(frontend._inbox)):
        def append(self, call):
            if self.is_first:
                self.is_first = False
                raise KeyboardInterrupt
            super().append(call)

    inbox = Interrupted()
    inbox.is_first = True
    monkeypatch.setattr(frontend, "_inbox", inbox)
    with pytest.raises(KeyboardInterrupt):
        submit(frontend)
    assert_nothing_stays(frontend)
