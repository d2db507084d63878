"""Runs: what a model is asked, prompts that were shortened, hostile answers, progress."""

import itertools
import json
import logging
import re
import time
from dataclasses import replace

from scripted import asked, run

from internlm2.eval.model import Request, ScriptedModel
from internlm2.eval.questions import RunSettings
from internlm2.eval.results import Results, TaskResult
from internlm2.eval.run_folder import read_samples
from internlm2.eval.runner import evaluate
from internlm2.eval.task import ChatPrompt, TextPrompt


def test_shortened_prompts_are_counted_named_and_kept_as_they_were_asked(sample, tmp_path, caplog):
    logging.getLogger("internlm2").propagate = True

    class Short(ScriptedModel):
        def answer(self, requests):
            for request, answer in super().answer(requests):
                yield request, replace(answer, dropped_shots=2, cut_tokens=4, finish_reason="length")

    settings = RunSettings(("mmlu.abstract_algebra",))
    parts = asked(sample, settings)
    task = evaluate(Short(lambda _: "A"), parts, tmp_path, settings).tasks["mmlu"]
    assert (task.num_dropped_shots, task.num_cut_prompts, task.num_cut_answers) == (3, 3, 3)
    item = next(parts[0].items)
    assert read_samples(tmp_path)[item.key].prompt == item.prompt.with_shots(3).text
    told = ", ".join(one.key for one in parts[0].items)
    assert task.dropped_shots == task.cut_prompts == tuple(one.key for one in parts[0].items)
    assert f"mmlu: 3 of 3 questions lost worked examples to the context limit: {told}." in caplog.text
    assert f"mmlu: 3 of 3 questions lost a part of their prompt to the context limit: {told}." in caplog.text
    assert Results.load(tmp_path).tasks["mmlu"].cut_prompts == task.cut_prompts


def test_only_a_few_of_many_shortened_prompts_are_named_in_words_and_all_in_the_results():
    keys = tuple(f"gsm8k:{n}" for n in range(5))
    task = TaskResult("gsm8k", {}, {}, 9, 0, 5, 0, 0, 0, 0, 0.0, "", {}, dropped_shots=keys)
    (told,) = task.shortenings
    assert told.endswith("limit: gsm8k:0, gsm8k:1, gsm8k:2, and others, which results.json lists")
    assert replace(task, num_dropped_shots=0).shortenings == []


def test_results_of_before_the_keys_were_kept_can_be_read(sample, tmp_path):
    run(sample, tmp_path, RunSettings(("gsm8k",)))
    content = json.loads((tmp_path / "results.json").read_text())
    for name in ("dropped_shots", "cut_prompts"):
        content["tasks"]["gsm8k"].pop(name)
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert Results.load(tmp_path).tasks["gsm8k"].dropped_shots == ()


def test_what_a_model_is_asked(sample, tmp_path):
    seen: dict[str, Request] = {}

    def note(request: Request) -> str:
        seen[request.key] = request
        return ""

    for is_chat, early_stop in ((False, False), (False, True), (True, True)):
        settings = RunSettings(("gsm8k",), "card-2024-01", is_chat, early_stop=early_stop)
        folder = tmp_path / f"{is_chat}{early_stop}"
        evaluate(ScriptedModel(note), asked(sample, settings), folder, settings)
        request = seen["gsm8k:0"]
        assert isinstance(request.prompt, ChatPrompt if is_chat else TextPrompt)
        assert (request.max_tokens, request.max_context_tokens) == (512, 2048)
        assert request.min_tokens == (0 if is_chat else 3)
        assert request.stop == (("\n\n", "\nQuestion:") if early_stop and not is_chat else ("\n\n",))


def test_hostile_answers_are_judged_in_bounded_time_and_kept(sample, tmp_path):
    hostile = [
        "A" * 1_000_000,
        "\\boxed{" * 100_000,
        "\0\x1b[2J\u2028 the answer is " * 30_000,
        "1," * 400_000,
        "the answer is \ud800 half a character \udc00",
    ]
    settings = RunSettings(
        ("mmlu.abstract_algebra", "gsm8k", "math", "bbh.date_understanding"), is_chat=True, limit=1
    )
    started = time.process_time()
    for n, text in enumerate(hostile):
        results = run(sample, tmp_path / str(n), settings, lambda item, text=text: text)
        assert results.num_errors == 0
        assert all(one.output == text for one in read_samples(tmp_path / str(n)).values())
    assert time.process_time() - started < 60


def test_progress_says_rate_and_time_left(sample, tmp_path, monkeypatch, caplog):
    clock = itertools.count(10**9)
    monkeypatch.setattr("internlm2.log.time.monotonic", lambda: float(next(clock)))
    logging.getLogger("internlm2").propagate = True
    with caplog.at_level(logging.INFO, logger="internlm2"):
        run(sample, tmp_path, RunSettings(("math",)))
    lines = [
        record.getMessage() for record in caplog.records if record.getMessage().startswith("Evaluating: ")
    ]
    assert len(lines) >= 3
    assert all(re.fullmatch(r"Evaluating: \d+%, [\d.]+ questions/s, \d+ s left", line) for line in lines)
    assert lines[-1].endswith(" 0 s left")
