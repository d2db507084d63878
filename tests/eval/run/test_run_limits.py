"""Limits of questions: for all tasks or for one, and runs that grow with them."""

import json
from dataclasses import replace

import pytest
from scripted import as_in_the_examples, asked, run

from internlm2.eval.questions import RunSettings, read_limits
from internlm2.eval.results import Results
from internlm2.eval.run_folder import read_samples
from internlm2.eval.task import EvalError, Item


def test_each_task_may_have_its_own_limit(sample):
    settings = RunSettings(("math", "gsm8k"), limit=3, task_limits={"gsm8k": 1})
    assert [len(list(part.items)) for part in asked(sample, settings)] == [3, 1]
    settings = RunSettings(("math", "gsm8k"), task_limits={"gsm8k": 1})
    assert [len(list(part.items)) for part in asked(sample, settings)] == [5, 1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (None, {})),
        ("20", (20, {})),
        (" 20, gsm8k=100 ,math=7", (20, {"gsm8k": 100, "math": 7})),
        ("gsm8k=100", (None, {"gsm8k": 100})),
    ],
)
def test_limits_are_read_as_they_are_typed(text, expected):
    assert read_limits(text) == expected


@pytest.mark.parametrize("text", ["many", "gsm8k=", "=", "1.5", "gsm8k=x"])
def test_limits_that_are_no_numbers_are_refused(text):
    with pytest.raises(EvalError, match="must be a number, with TASK=NUMBER for other limits"):
        read_limits(text)


def test_a_larger_limit_draws_what_a_smaller_one_drew(sample):
    def drawn(limit: int) -> set[str]:
        return {item.key for item in asked(sample, RunSettings(("math",), limit=limit))[0].items}

    assert drawn(1) < drawn(2) < drawn(3) < drawn(4)


@pytest.mark.parametrize(
    "larger",
    [{"limit": 3}, {"limit": None}, {"task_limits": {"math": 4}}, {"limit": 2, "task_limits": {"gsm8k": 3}}],
)
def test_a_run_grows_with_its_limit(larger, sample, tmp_path):
    """What is there is not asked again, and the results are those of a run that was as large from the start."""
    small = RunSettings(("math", "gsm8k"), limit=2)
    run(sample, tmp_path / "run", small, as_in_the_examples)
    before = read_samples(tmp_path / "run")
    whole = replace(small, **larger)
    parts, said = asked(sample, whole), []

    def say(item: Item) -> str:
        said.append(item.key)
        return as_in_the_examples(item)

    grown = run(sample, tmp_path / "run", whole, say)
    assert sorted([*before, *said]) == sorted(item.key for part in parts for item in part.items)
    straight = run(sample, tmp_path / "straight", whole, as_in_the_examples)
    assert {name: task.rows for name, task in grown.tasks.items()} == {
        name: task.rows for name, task in straight.tasks.items()
    }
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == json.loads(
        (tmp_path / "straight" / "run.json").read_text()
    )
    assert Results.load(tmp_path / "run").task_limits == whole.task_limits


def test_a_run_that_grows_has_no_results_until_it_ends(sample, tmp_path):
    small = RunSettings(("gsm8k",), limit=1)
    run(sample, tmp_path, small)

    def broken(item: Item) -> str:
        raise EvalError("broken")

    with pytest.raises(EvalError, match="broken"):
        run(sample, tmp_path, replace(small, limit=2), broken)
    with pytest.raises(EvalError, match="let `internlm2 eval run` finish it first"):
        Results.load(tmp_path)
    assert run(sample, tmp_path, replace(small, limit=2)).tasks["gsm8k"].rows["gsm8k"].n == 2


@pytest.mark.parametrize(
    "other",
    [
        {"limit": 1},
        {"limit": 3, "seed": 1},
        {"limit": 3, "profile": "fixed"},
        {"limit": 3, "task_limits": {"gsm8k": 1}},
        {"limit": 3, "tasks": ("math",)},
    ],
)
def test_a_smaller_limit_or_one_with_other_settings_is_refused(other, sample, tmp_path):
    small = RunSettings(("math", "gsm8k"), limit=2)
    run(sample, tmp_path, small)
    kept = (tmp_path / "run.json").read_bytes(), (tmp_path / "results.json").read_bytes()
    with pytest.raises(EvalError, match="holds a run with other settings"):
        run(sample, tmp_path, replace(small, **other))
    assert kept == ((tmp_path / "run.json").read_bytes(), (tmp_path / "results.json").read_bytes())


def test_other_prompts_of_a_task_whose_limit_stays_are_refused(sample, tmp_path):
    small = RunSettings(("math", "gsm8k"), limit=2)
    run(sample, tmp_path, small)
    path = tmp_path / "run.json"
    path.write_text(
        path.read_text().replace(json.loads(path.read_text())["tasks"]["math"]["prompt_sha256"], "0")
    )
    with pytest.raises(EvalError, match=r"tasks\.math\.prompt_sha256 was"):
        run(sample, tmp_path, replace(small, task_limits={"gsm8k": 3}))
