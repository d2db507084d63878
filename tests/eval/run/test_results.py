"""Tables, and samples in the terminal."""

from dataclasses import replace
from pathlib import Path

import pytest

from internlm2.eval.model import Answer, ScriptedModel
from internlm2.eval.profile import find_profile
from internlm2.eval.published_scores import CARD_NAMES, PUBLISHED, nearest
from internlm2.eval.questions import RunSettings, choose_questions
from internlm2.eval.results import Results
from internlm2.eval.run_folder import Sample
from internlm2.eval.runner import evaluate
from internlm2.eval.table import FinishedRun, sample_text, table
from internlm2.eval.task import EvalError
from internlm2.eval.tasks import CARD_TASKS

CARD = Path(__file__).parents[4] / "shared" / "model-card.md"


def finished(
    sample, folder: Path, settings: RunSettings, *, right=lambda item: True, name="script", fails=()
):
    parts = choose_questions(sample, find_profile(settings.profile), settings)
    items = {item.key: item for part in parts for item in part.items}

    class Model(ScriptedModel):
        def answer(self, requests):
            for request, answer in super().answer(requests):
                yield request, Answer(error="it broke") if request.key in fails else answer

    def say(request):
        return items[request.key].gold if right(items[request.key]) else "D"

    evaluate(Model(say, name=name), parts, folder, settings)
    return FinishedRun.load(folder)


def test_the_table_shows_runs_beside_the_card(sample, tmp_path):
    settings = RunSettings(("gsm8k", "math", "mmlu.abstract_algebra"), "fixed")
    first = finished(sample, tmp_path / "a", settings, name="internlm/internlm2-20b")
    second = finished(sample, tmp_path / "b", settings, name="demo", right=lambda item: item.task == "gsm8k")
    lines = table([first, second]).splitlines()
    assert lines[0].split("  ")[0] == "benchmark"
    assert "card: InternLM2-20B" in lines[0]
    assert "card: InternLM2-7B" in lines[0]
    cells = {
        line.split("  ")[0]: [cell.strip() for cell in line.split("  ") if cell.strip()]
        for line in lines[1:4]
    }
    both = ["GSM8K", "100.0 ± 0.0", "100.0 ± 0.0", "+0.0 ± 0.0", "1.0000", "3", "76.1", "70.8"]
    assert cells["GSM8K"] == both
    assert cells["MATH"] == [
        "MATH",
        "100.0 ± 0.0",
        "0.0 ± 0.0",
        "+100.0 ± 0.0",
        "0.0625",
        "5",
        "25.5",
        "20.2",
    ]
    assert lines[-1] == "p: McNemar, exact, over the questions that both runs have a verdict on"
    assert cells["mmlu.abstract_algebra"][1] == "100.0 ± 0.0", (
        "single subjects are shown where the whole is missing"
    )
    assert (
        f"{tmp_path / 'a'}: internlm/internlm2-20b, profile fixed, base mode, 11 questions (all questions)"
        in lines
    )
    assert list(table([first]).splitlines()[1].split()) == ["mmlu.abstract_algebra", "100.0", "±", "0.0"]


def test_the_markdown_table_has_a_cell_for_every_column(sample, tmp_path):
    run = finished(sample, tmp_path, RunSettings(("gsm8k",)), name="a|b")
    lines = table([run], form="markdown").splitlines()
    assert lines[:3] == [
        "| benchmark | a\\|b | card: InternLM2-7B |",
        "| --- | --- | --- |",
        "| GSM8K | 100.0 ± 0.0 | 70.8 |",
    ]


def test_the_table_never_hides_what_is_missing(sample, tmp_path):
    some = finished(sample, tmp_path / "some", RunSettings(("gsm8k",)), fails={"gsm8k:0"})
    none = finished(sample, tmp_path / "none", RunSettings(("math",)), fails={f"math:{n}" for n in range(5)})
    text = table([some, none])
    assert "100.0 ± 0.0 (1 errors)" in text
    assert "incomplete (5 errors)" in text
    assert text.count("not run") == 2
    assert [line.split()[-2] for line in text.splitlines()[1:3]] == ["0", "0"], "nothing in common"
    assert "math: 5 questions have no verdict: see `internlm2 eval show RUN --errors`" in text
    shortened = replace(some.results.tasks["gsm8k"], num_dropped_shots=2, num_cut_prompts=1)
    cut = replace(some, results=replace(some.results, tasks={"gsm8k": shortened}, keeps_context_limit=False))
    notes = table([cut])
    assert "gsm8k: 2 of 3 questions lost worked examples to the context limit" in notes
    assert "gsm8k: 1 of 3 questions lost a part of their prompt to the context limit" in notes
    assert "the context limit of the profile was not kept" in notes


def test_runs_of_one_model_are_told_apart_by_their_folders(sample, tmp_path):
    runs = [finished(sample, tmp_path / name, RunSettings(("gsm8k",))) for name in ("left", "right")]
    assert "script (left)" in table(runs)
    assert "script (right)" in table(runs)


def test_results_that_are_missing_or_damaged_are_refused(tmp_path):
    with pytest.raises(EvalError, match=r"There is no .*results\.json\. Give the folder of a run, and let"):
        FinishedRun.load(tmp_path)
    for content in ("[1]", "{", '{"model": 3}'):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(EvalError, match="Remove it and start the run again"):
            Results.load(tmp_path)


def test_published_scores_are_those_of_the_card():
    assert tuple(CARD_NAMES) == CARD_TASKS
    if not CARD.is_file():
        pytest.skip("needs ../shared/model-card.md")
    rows = [
        [cell.strip() for cell in line.strip("| \n").split("|")] for line in CARD.open() if line[0] == "|"
    ]
    head = next(row for row in rows if row[0].startswith("Dataset"))
    for task, name in CARD_NAMES.items():
        row = next(row for row in rows if row[0] == name)
        assert {model: PUBLISHED[model][task] for model in PUBLISHED} == {
            model: float(cell) for model, cell in zip(head[1:5], row[1:5], strict=True)
        }


def test_the_nearest_published_model():
    assert nearest("internlm/internlm2-chat-20b", is_chat=True) == "InternLM2-Chat-20B"
    assert nearest("/models/internlm2_7b", is_chat=True) == "InternLM2-7B"
    assert nearest("demo", is_chat=True) == "InternLM2-Chat-7B"
    assert nearest("demo", is_chat=False) == "InternLM2-7B"


def test_a_single_question_has_no_standard_error(sample, tmp_path):
    run = finished(sample, tmp_path, RunSettings(("gsm8k",), limit=1))
    assert run.results.tasks["gsm8k"].rows["gsm8k"].standard_error is None
    assert "NaN" not in (tmp_path / "results.json").read_text()
    assert "GSM8K      100.0   70.8" in table([run])
    assert "(1 of each subset, seed 0)" in table([run])


def test_samples_cannot_write_to_the_terminal():
    hostile = "\x1b[2J\x00\x9b31m\ud800 fine\n\tand well 中文"
    sample = Sample(
        "gsm8k:0", "gsm8k", "", 0, "p" * 700, "18", output=hostile, extracted="\x1b", error="e\x07"
    )
    text = sample_text(sample)
    assert "\\x1b[2J\\x00\\x9b31m\\ud800 fine\n\tand well 中文" in text
    assert not set(text) & set("\x1b\x00\x9b\x07\ud800")
    assert "[100 characters before this; --whole shows them]" in text
    assert "p" * 601 not in text
    assert "p" * 700 in sample_text(sample, is_whole=True)
    assert "=== gsm8k:0: error" in text


def test_a_sample_says_what_was_cut():
    sample = Sample(
        "g:0", "g", "", 0, "p", "1", dropped_shots=2, cut_tokens=3, finish_reason="length", score=1.0
    )
    head = sample_text(sample).splitlines()[0]
    assert head == "=== g:0: right, 2 examples dropped, 3 tokens cut from the prompt, the answer was cut"
