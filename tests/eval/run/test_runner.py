"""Runs: what reference answers score, runs that were killed, questions that fail, folders that do not fit."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
from scripted import as_in_the_examples, asked, run

from internlm2.errors import ConfigError
from internlm2.eval.data.folder import DataError, DataFolder
from internlm2.eval.model import Answer, ScriptedModel
from internlm2.eval.questions import RunSettings
from internlm2.eval.results import Results
from internlm2.eval.run_folder import RunFolder, Sample, read_samples
from internlm2.eval.runner import evaluate, run_in_sandbox
from internlm2.eval.task import EvalError, Item
from internlm2.sandbox import SandboxError

SMALL = ("mmlu.abstract_algebra", "gsm8k", "math")


# -- scores --------------------------------------------------------------------------------------------------


def test_gold_answers_score_what_the_scorers_allow(sample, tmp_path):
    settings = RunSettings((*SMALL, "bbh.date_understanding", "agieval.sat-math"))
    results = run(sample, tmp_path / "run", settings, as_in_the_examples)
    assert results.num_errors == 0
    percents = {
        name: row.percent for task in results.tasks.values() for name, row in task.subsets.items() if name
    }
    assert percents == {"abstract_algebra": 100, "date_understanding": 100, "sat-math": 100}
    assert results.tasks["gsm8k"].rows["gsm8k"].percent == 100
    assert results.tasks["math"].rows["math"].n == 5
    assert results.tasks["mmlu"].rows == {}, "one subject is not the benchmark"
    assert results == Results.load(tmp_path / "run")


def test_wrong_answers_score_nothing(sample, tmp_path):
    settings = RunSettings(SMALL)
    wrong = run(sample, tmp_path / "run", settings, lambda item: "none" if not item.labels else "")
    assert wrong.tasks["gsm8k"].rows["gsm8k"].percent == 0
    samples = read_samples(tmp_path / "run").values()
    # on a tie of all labels the first one is chosen
    assert {s.output for s in samples if s.task == "mmlu"} == {"A"}
    assert {s.score for s in samples if s.task == "gsm8k"} == {0.0}


@pytest.mark.parametrize(
    ("settings", "right"),
    [
        (RunSettings(("gsm8k",), "card-2024-01", True), 1317),
        (RunSettings(("gsm8k",), "fixed", False), 1319),
        (RunSettings(("math",), "card-2024-01", False), 4614),
    ],
)
def test_reference_answers_reach_through_a_run_what_the_scorers_say(settings, right, shared, tmp_path):
    name = settings.tasks[0]
    results = run(shared, tmp_path / "run", settings, as_in_the_examples)
    row = results.tasks[name].rows[name]
    assert round(row.percent * row.n / 100) == right


def test_programs_are_run_in_the_sandbox(sample, tmp_path):
    settings = RunSettings(("humaneval",), "fixed", limit=2)
    assert run(sample, tmp_path / "good", settings).tasks["humaneval"].rows["humaneval"].percent == 100
    bad = run(sample, tmp_path / "bad", settings, lambda item: "    return None")
    assert bad.tasks["humaneval"].rows["humaneval"].percent == 0


def test_a_program_passes_only_when_it_ends_well_and_in_time():
    tests = "assert sum(2, 3) == 5"
    assert run_in_sandbox("def sum(a, b): return a + b", 5.0, tests=tests, entry_points=["sum"])
    assert not run_in_sandbox("def sum(a, b): return a - b", 5.0, tests=tests, entry_points=["sum"])
    assert not run_in_sandbox("while True: pass", 0.5, tests="")
    waiting = "import time\ntime.sleep(2)"
    assert run_in_sandbox(waiting, 1.0, tests=""), "a busy machine is no fault of a program"
    assert not run_in_sandbox(waiting.replace("2", "1000"), 1.0, tests="")
    assert not run_in_sandbox("import sys; sys.exit(0)", 5.0, tests="assert True")


def test_a_sandbox_that_cannot_be_built_ends_the_run(sample, tmp_path):
    def broken(program: str, timeout_seconds: float, **_: object) -> bool:
        raise SandboxError("no namespaces")

    settings = RunSettings(("gsm8k", "humaneval"))
    with pytest.raises(SandboxError, match="no namespaces"):
        run(sample, tmp_path / "run", settings, run=broken)
    assert {one.task for one in read_samples(tmp_path / "run").values()} == {"gsm8k"}
    assert not (tmp_path / "run" / "results.json").exists()


def test_every_sample_is_kept_whole(sample, tmp_path):
    settings = RunSettings(("mmlu.abstract_algebra", "gsm8k"))
    run(sample, tmp_path / "run", settings, lambda item: item.gold if item.labels else "I say 18\0 or\n19")
    samples = read_samples(tmp_path / "run")
    assert list(samples)[:4] == [*(f"mmlu.abstract_algebra:{n}" for n in range(3)), "gsm8k:0"]
    item = next(asked(sample, settings)[1].items)
    kept = samples["gsm8k:0"]
    assert (kept.prompt, kept.output, kept.extracted, kept.gold, kept.score) == (
        item.text(), "I say 18\0 or\n19", "19", "18", 0.0,
    )  # fmt: skip
    assert samples["mmlu.abstract_algebra:0"].logprobs == {"A": -1.0, "B": 0.0, "C": -1.0, "D": -1.0}


# -- going on ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def without_seconds(results: Results) -> dict:
    found = asdict(results)
    for task in found["tasks"].values():
        task.pop("seconds")
    return found


@pytest.mark.parametrize("num_answers", [0, 1, 7])
def test_a_killed_run_goes_on_where_it_was_to_the_same_results(num_answers, sample, tmp_path):
    settings = RunSettings(SMALL)
    count = 0

    def killed(item: Item) -> str:
        nonlocal count
        count += 1
        if count > num_answers:
            raise Killed
        return as_in_the_examples(item)

    with pytest.raises(Killed):
        run(sample, tmp_path / "killed", settings, killed)
    with (tmp_path / "killed" / "samples.jsonl").open("a") as file:
        file.write(
            '{"key": "gsm8k:2", "output": "half a li' + 99_999 * "n"
        )  # as a kill while writing leaves it
    assert len(read_samples(tmp_path / "killed")) == num_answers
    later: list[str] = []

    def going_on(item: Item) -> str:
        later.append(item.key)
        return as_in_the_examples(item)

    continued = run(sample, tmp_path / "killed", settings, going_on)
    straight = run(sample, tmp_path / "straight", settings, as_in_the_examples)
    assert without_seconds(continued) == without_seconds(straight)
    assert len(later) == 11 - num_answers
    lines = (tmp_path / "killed" / "samples.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == 11


KILLED = """
import sys, time
from pathlib import Path
from internlm2.eval.data.folder import DataFolder
from internlm2.eval.model import ScriptedModel
from internlm2.eval.profile import find_profile
from internlm2.eval.questions import RunSettings, choose_questions
from internlm2.eval.runner import evaluate

settings = RunSettings(("mmlu.abstract_algebra", "gsm8k", "math"))
parts = choose_questions(DataFolder(sys.argv[1]), find_profile(settings.profile), settings)

def say(request):
    time.sleep(0.02)
    return "B" if request.labels else "The answer is 18"

evaluate(ScriptedModel(say), parts, Path(sys.argv[2]), settings)
"""


def test_a_run_ended_by_sigkill_goes_on_to_the_same_results(sample, tmp_path):
    folder = tmp_path / "killed"
    samples = folder / "samples.jsonl"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(sample.path), str(folder)])
    try:
        while process.poll() is None and not (samples.exists() and samples.read_bytes().count(b"\n") >= 4):
            time.sleep(0.005)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    settings = RunSettings(SMALL)
    num_kept = len(read_samples(folder))
    assert 4 <= num_kept < 11
    later: list[str] = []

    def say(item: Item) -> str:
        later.append(item.key)
        return "B" if item.labels else "The answer is 18"

    continued = run(sample, folder, settings, say)
    assert len(later) == 11 - num_kept
    straight = run(sample, tmp_path / "straight", settings, say)
    assert without_seconds(continued) == without_seconds(straight)


def test_a_finished_run_asks_nothing_again(sample, tmp_path):
    settings = RunSettings(("gsm8k",))
    first = run(sample, tmp_path, settings)

    def never(item: Item) -> str:
        raise AssertionError(item.key)

    assert run(sample, tmp_path, settings, never) == first


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"profile": "fixed"}, 'settings.profile was "card-2024-02" and is "fixed"'),
        ({"seed": 3}, "settings.seed was 0 and is 3"),
        ({"limit": 2}, "settings.limit was null and is 2"),
        ({"task_limits": {"gsm8k": 2}}, "settings.task_limits.gsm8k was not given and is 2"),
        ({"tasks": ("gsm8k", "math")}, "settings.tasks was "),
    ],
)
def test_other_settings_in_the_run_folder_are_refused(change, told, sample, tmp_path):
    settings = RunSettings(("gsm8k",))
    run(sample, tmp_path, settings)
    with pytest.raises(EvalError, match="holds a run with other settings") as caught:
        run(sample, tmp_path, replace(settings, **change))
    assert told in str(caught.value)
    assert "Give another folder" in str(caught.value)


def test_other_data_or_another_model_in_the_run_folder_is_refused(sample, tmp_path):
    settings = RunSettings(("gsm8k",))
    run(sample, tmp_path / "run", settings)
    for name in ("gsm8k/test.jsonl", "shots/gsm8k_base.json"):
        target = tmp_path / "data" / name
        target.parent.mkdir(parents=True)
        target.write_bytes(sample.bytes(name).replace(b"eggs", b"figs"))
    with pytest.raises(EvalError, match=r"tasks\.gsm8k\.prompt_sha256 was "):
        run(DataFolder(tmp_path / "data"), tmp_path / "run", settings)
    with pytest.raises(EvalError, match=r'model\.name was "script" and is "other"'):
        evaluate(
            ScriptedModel(lambda _: "", name="other"), asked(sample, settings), tmp_path / "run", settings
        )


def test_a_folder_that_is_no_run_is_left_alone(sample, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(EvalError, match="holds something else than a run"):
        run(sample, tmp_path, RunSettings(("gsm8k",)))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_processes_cannot_write_the_same_run(tmp_path):
    with RunFolder(tmp_path, {}), pytest.raises(EvalError, match="Another process is running in"):
        RunFolder(tmp_path, {})


@pytest.mark.parametrize("line", ["{}", "nonsense", "[1]", '{"key": 3}'])
def test_a_damaged_line_is_named(line, sample, tmp_path):
    run(sample, tmp_path, RunSettings(("gsm8k",)))
    path = tmp_path / "samples.jsonl"
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(EvalError, match=r"samples\.jsonl is damaged at line 1: "):
        read_samples(tmp_path)


def test_a_field_of_another_kind_is_damage(tmp_path):
    fields = asdict(Sample("gsm8k:0", "gsm8k", "", 0, "p", "g")) | {"score": "1"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(fields) + "\n")
    with pytest.raises(EvalError, match="damaged at line 1: score is '1'"):
        read_samples(tmp_path)


# -- what fails ----------------------------------------------------------------------------------------------


class FailsOnce(ScriptedModel):
    """Has no answer to one question while `is_ill`."""

    is_ill = True

    def answer(self, requests):
        for request, answer in super().answer(requests):
            is_bad = self.is_ill and request.key == "gsm8k:1"
            yield request, Answer(error="gsm8k:1 is too much for me.") if is_bad else answer


def test_a_failed_question_is_counted_apart_and_asked_again(sample, tmp_path):
    settings = RunSettings(("gsm8k",))
    parts = asked(sample, settings)
    golds = {item.key: item.gold for item in parts[0].items}
    model = FailsOnce(lambda request: golds[request.key])
    ill = evaluate(model, parts, tmp_path, settings).tasks["gsm8k"]
    assert (ill.num_errors, ill.num_questions, ill.rows["gsm8k"].n, ill.rows["gsm8k"].percent) == (
        1,
        3,
        2,
        100,
    )
    assert read_samples(tmp_path)["gsm8k:1"].error == "gsm8k:1 is too much for me."
    model.is_ill = False
    well = evaluate(model, parts, tmp_path, settings).tasks["gsm8k"]
    assert (well.num_errors, well.rows["gsm8k"].n) == (0, 3)


def test_unknown_names_and_missing_files_are_named(sample, tmp_path):
    cases = [
        (RunSettings(("gsm9k",)), EvalError, "There is no benchmark 'gsm9k'. Did you mean 'gsm8k'?"),
        (RunSettings(("mmlu.anatomi",)), EvalError, "mmlu has no subset 'anatomi'. Did you mean 'anatomy'?"),
        (RunSettings(()), EvalError, "No task is given"),
        (RunSettings(limit=0), EvalError, "limit is 0, but must be at least 1"),
        (RunSettings(task_limits={"gsm8k": 0}), EvalError, "limit is 0, but must be at least 1"),
        (RunSettings(task_limits={"gsm": 1}), EvalError, "A limit is given for 'gsm', which is not asked"),
        (RunSettings(profile="card"), ConfigError, "There is no profile 'card'"),
        (RunSettings(("mmlu.anatomy",)), DataError, "mmlu/dev/anatomy_dev.csv is not in"),
    ]
    for settings, kind, told in cases:
        with pytest.raises(kind) as caught:
            asked(sample, settings)
        assert told in str(caught.value)


def test_a_limit_draws_with_the_seed(sample):
    def drawn(seed: int) -> list[str]:
        settings = RunSettings(("math",), limit=2, seed=seed)
        return [item.key for item in asked(sample, settings)[0].items]

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(10)}) > 1
    assert all(len(drawn(seed)) == 2 for seed in range(10))
    settings = RunSettings(("math",), limit=99)
    assert len(list(asked(sample, settings)[0].items)) == 5
