"""Runs that are split: by hand over machines, and over workers on Ray."""

import json
import os
import shutil
import signal
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest

from internlm2.cli.main import run as command
from internlm2.errors import CheckpointError, MissingDependencyError, RequestError
from internlm2.eval.data.folder import DataFolder
from internlm2.eval.model import Request, ScriptedModel
from internlm2.eval.profile import find_profile
from internlm2.eval.questions import Part, RunSettings, choose_questions
from internlm2.eval.results import Results
from internlm2.eval.run_folder import read_samples
from internlm2.eval.runner import evaluate
from internlm2.eval.shards import Shard, evaluate_shard, merge
from internlm2.eval.task import EvalError

SETTINGS = RunSettings(
    ("mmlu.abstract_algebra", "gsm8k", "math", "bbh.date_understanding", "agieval.sat-math")
)


def guess(request: Request) -> str:
    """Right for some, wrong for others, and a stop string's length of text."""
    return "B" if request.labels else f"So the answer is {len(request.prompt.text) % 20}."


def asked(data: DataFolder, settings: RunSettings = SETTINGS) -> list[Part]:
    return choose_questions(data, find_profile(settings.profile), settings)


def comparable(results: Results) -> dict:
    found = asdict(results)
    for task in found["tasks"].values():
        task.pop("seconds")
    return found


@pytest.fixture(scope="module")
def straight(sample, tmp_path_factory) -> Results:
    return evaluate(ScriptedModel(guess), asked(sample), tmp_path_factory.mktemp("straight"), SETTINGS)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """The samples are few: with blocks of 16 the first shard would have them all."""
    monkeypatch.setattr("internlm2.eval.shards._BLOCK", 2)


# -- by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_every_question_belongs_to_one_shard(count, sample):
    parts = asked(sample)
    everything = [item.key for part in parts for item in part.items]
    shares = [
        [item.key for part in Shard(n, count).share(parts) for item in part.items]
        for n in range(1, count + 1)
    ]
    assert sorted(key for share in shares for key in share) == sorted(everything)
    assert max(map(len, shares)) - min(map(len, shares)) <= 2
    for share in shares:
        assert [key for key in everything if key in share] == share, "in order"
    if count == 2:
        assert shares[0][:2] == everything[:2], "neighbours stay together"


def test_few_questions_are_shared_as_well(sample, monkeypatch):
    monkeypatch.setattr("internlm2.eval.shards._BLOCK", 16)
    settings = RunSettings(("gsm8k",), "fixed", is_chat=True, limit=2)
    sizes = [sum(len([*p.items]) for p in Shard(n, 2).share(asked(sample, settings))) for n in (1, 2)]
    assert sizes == [1, 1], "in blocks of 16 one machine would have loaded a model for nothing"


def test_shards_merge_to_the_results_of_one_run(sample, straight, tmp_path):
    for number in (3, 1, 2):
        evaluate_shard(ScriptedModel(guess), asked(sample), tmp_path, SETTINGS, shard=Shard(number, 3))
    merged = merge(tmp_path, sample)
    assert comparable(merged) == comparable(straight)
    assert merged.tasks["gsm8k"].rows["gsm8k"].n > 0
    assert Results.load(tmp_path) == merged
    shards = [read_samples(path) for path in (tmp_path / "shards").iterdir()]
    assert all(0 < len(one) < len(read_samples(tmp_path)) for one in shards)
    seconds = {key: one.seconds for shard in shards for key, one in shard.items()}
    assert {key: one.seconds for key, one in read_samples(tmp_path).items()} == seconds
    assert merge(tmp_path, sample) == merged, "merging again changes nothing"


def test_what_is_missing_is_named_and_can_be_asked_without_shards(sample, straight, tmp_path):
    evaluate_shard(ScriptedModel(guess), asked(sample), tmp_path, SETTINGS, shard=Shard(1, 2))

    class Killed(BaseException):
        pass

    def dies(request: Request) -> str:
        if request.key == killed_at:
            raise Killed
        return guess(request)

    second = [item.key for part in Shard(2, 2).share(asked(sample)) for item in part.items]
    killed_at = second[3]
    with pytest.raises(Killed):
        evaluate_shard(ScriptedModel(dies), asked(sample), tmp_path, SETTINGS, shard=Shard(2, 2))
    with pytest.raises(EvalError, match=rf"{len(second) - 3} questions are not answered yet \({killed_at} is the first\)"
                       r"\. Shards that have not ended: 2-of-2\."):  # fmt: skip
        merge(tmp_path, sample)
    assert len(read_samples(tmp_path)) > 3, "what was there is kept"
    later: list[str] = []

    def notes(request: Request) -> str:
        later.append(request.key)
        return guess(request)

    results = evaluate(ScriptedModel(notes), asked(sample), tmp_path, SETTINGS)
    assert later == second[3:]
    assert comparable(results) == comparable(straight)


def test_a_killed_shard_goes_on_and_shards_may_be_split_anew(sample, straight, tmp_path):
    evaluate_shard(ScriptedModel(guess), asked(sample), tmp_path, SETTINGS, shard=Shard(1, 2))
    for number in (1, 2, 3, 4):
        evaluate_shard(ScriptedModel(guess), asked(sample), tmp_path, SETTINGS, shard=Shard(number, 4))
    assert comparable(merge(tmp_path, sample)) == comparable(straight)


def test_an_answer_wins_over_an_error(sample, tmp_path):
    def ill(request: Request) -> str:
        raise RequestError("ill")

    class Ill(ScriptedModel):
        def answer(self, requests):
            from internlm2.eval.model import Answer

            for request in requests:
                yield request, Answer(error="ill")

    settings = RunSettings(("gsm8k",))
    evaluate_shard(Ill(ill), asked(sample, settings), tmp_path, settings, shard=Shard(1, 1))
    assert merge(tmp_path, sample).num_errors == 3
    for number in (1, 2):
        evaluate_shard(
            ScriptedModel(guess), asked(sample, settings), tmp_path, settings, shard=Shard(number, 2)
        )
    assert merge(tmp_path, sample).num_errors == 0


def test_shards_of_different_runs_and_other_data_are_refused(sample, tmp_path):
    settings = RunSettings(("gsm8k",))
    evaluate_shard(ScriptedModel(guess), asked(sample, settings), tmp_path, settings, shard=Shard(1, 2))
    other = RunSettings(("gsm8k",), seed=5)
    evaluate_shard(ScriptedModel(guess), asked(sample, other), tmp_path, other, shard=Shard(2, 2))
    with pytest.raises(EvalError, match=r"settings\.seed was 0 and is 5"):
        merge(tmp_path, sample)
    shutil.rmtree(tmp_path / "shards" / "2-of-2")
    evaluate_shard(ScriptedModel(guess), asked(sample, settings), tmp_path, settings, shard=Shard(2, 2))
    for name in ("gsm8k/test.jsonl", "shots/gsm8k_base.json"):
        target = tmp_path / "data" / name
        target.parent.mkdir(parents=True)
        target.write_bytes(sample.bytes(name).replace(b"eggs", b"figs"))
    with pytest.raises(EvalError, match=r"tasks\.gsm8k\.\w+_sha256.* was"):
        merge(tmp_path, DataFolder(tmp_path / "data"))
    assert merge(tmp_path, sample).tasks["gsm8k"].num_questions == 3


def test_mistakes_are_named(sample, tmp_path):
    for text in ("0/2", "3/2", "1", "a/b", "1/2/3", "-1/2", "1/0", "9999999/9999999"):
        with pytest.raises(EvalError, match=r"must be I/N with I from 1 to N, such as 2/8"):
            Shard.parse(text)
    assert Shard.parse("2/8") == Shard(2, 8)
    with pytest.raises(EvalError, match=r"There are no shards in .*Run `internlm2 eval run"):
        merge(tmp_path, sample)
    settings = RunSettings(("gsm8k",))
    evaluate_shard(ScriptedModel(guess), asked(sample, settings), tmp_path, settings, shard=Shard(1, 1))
    path = tmp_path / "shards" / "1-of-1" / "run.json"
    for damage in ({"settings": None}, {"settings": {"tasks": 3}}, {"model": "x"}):
        path.write_text(json.dumps({"settings": {}, "model": {}} | damage))
        with pytest.raises(EvalError, match=r"run\.json is damaged: .*Remove this shard"):
            merge(tmp_path, sample)


def internlm2(*words: object) -> int:
    return command([str(word) for word in words])


@pytest.fixture
def words(chat_folder, sample) -> list[object]:
    """A run of the tiny model over two kinds of questions."""
    return [
        "eval", "run", chat_folder, "--tasks", "mmlu.abstract_algebra,bbh.boolean_expressions", "--data", sample.path,
        "--dtype", "float32", "--device", "cpu", "--threads", 1, "--max-model-len", 3000, "--profile", "fixed",
        "--no-self-check",
    ]  # fmt: skip


def verdicts(folder: Path) -> dict[str, tuple[str, float]]:
    return {key: (one.output, one.score) for key, one in read_samples(folder).items()}


def test_the_command_line_runs_shards_and_merges_them(words, sample, tmp_path, capsys):
    whole, split = tmp_path / "whole", tmp_path / "split"
    assert internlm2(*words, "--output", whole) == 0
    expected = capsys.readouterr().out.splitlines()[1:3]
    assert internlm2(*words, "--output", split, "--shard", "2/2") == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert f"Shard 2 of 2 is done: 2 questions. When all are: internlm2 eval merge {split}" in said.err
    assert internlm2("eval", "merge", split, "--data", sample.path) == 2
    assert "4 questions are not answered yet" in capsys.readouterr().err
    assert internlm2(*words, "--output", split, "--shard", "1/2") == 0
    assert internlm2("eval", "merge", split, "--data", sample.path) == 0
    assert capsys.readouterr().out.splitlines()[1:3] == expected
    assert verdicts(split) == verdicts(whole)
    assert internlm2(*words, "--output", split) == 0, "it is a run like any other"
    assert internlm2(*words, "--output", split, "--shard", "3/2") == 2
    assert internlm2(*words, "--output", split, "--workers", 2, "--endpoint", "http://localhost:1/v1") == 2
    assert "workers is 2, but an endpoint has its own" in capsys.readouterr().err


# -- on Ray --------------------------------------------------------------------------------------------------


def scripted() -> ScriptedModel:
    return ScriptedModel(guess)


def deadly(flag: str, deadly_key: str, num_deaths: int) -> ScriptedModel:
    """Kills its own process with one question, the first so many times."""

    def answer(request: Request) -> str:
        if request.key == deadly_key:
            marks = len(list(Path(flag).iterdir()))
            if marks < num_deaths:
                (Path(flag) / str(marks)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return guess(request)

    return ScriptedModel(answer)


def unreadable() -> ScriptedModel:
    raise CheckpointError("There is no model here. Give another folder.")


def named_after_its_process() -> ScriptedModel:
    return ScriptedModel(guess, name=f"model-{os.getpid()}")


def noting(folder: str) -> ScriptedModel:
    """Notes which process answered what, slowly enough for two to take part."""
    import time

    def answer(request: Request) -> str:
        time.sleep(0.02)
        (Path(folder) / f"{os.getpid()}-{request.key.replace(':', '-')}").touch()
        return guess(request)

    return ScriptedModel(answer)


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs of this machine, whatever it has."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    ray.init(num_cpus=2, include_dashboard=False, logging_level="WARNING", log_to_driver=False,
             object_store_memory=100_000_000)  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    if "ray" in sys.modules:
        monkeypatch.setattr("internlm2.eval.backends.ray_workers._BATCH_SIZES", (4, 2, 1))


def over_ray(build, sample, folder, settings=SETTINGS, num_workers=2) -> Results:
    from internlm2.eval.backends.ray_workers import RayModel

    with RayModel(build, num_workers=num_workers) as model:
        return evaluate(model, asked(sample, settings), folder, settings)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
class TestRay:
    def test_two_workers_give_the_results_of_one(self, sample, straight, tmp_path):
        (tmp_path / "notes").mkdir()
        found = over_ray(partial(noting, str(tmp_path / "notes")), sample, tmp_path / "run")
        assert comparable(found) == comparable(straight)
        processes = {path.name.split("-")[0] for path in (tmp_path / "notes").iterdir()}
        assert len(processes) == 2
        assert str(os.getpid()) not in processes

    @pytest.mark.parametrize("num_deaths", [1, 2])
    def test_the_questions_of_a_killed_worker_are_answered_all_the_same(
        self, num_deaths, sample, straight, tmp_path
    ):
        (tmp_path / "flag").mkdir()
        found = over_ray(
            partial(deadly, str(tmp_path / "flag"), "gsm8k:1", num_deaths), sample, tmp_path / "run"
        )
        assert len(list((tmp_path / "flag").iterdir())) == num_deaths
        assert comparable(found) == comparable(straight)

    def test_a_question_that_kills_every_worker_is_an_error_and_no_other_is(self, sample, straight, tmp_path):
        (tmp_path / "flag").mkdir()
        found = over_ray(partial(deadly, str(tmp_path / "flag"), "gsm8k:1", 99), sample, tmp_path / "run")
        assert found.num_errors == 1
        assert (
            "3 workers died while they had this question" in read_samples(tmp_path / "run")["gsm8k:1"].error
        )
        assert {**found.tasks, "gsm8k": 0}.keys() == straight.tasks.keys()
        assert found.tasks["math"].rows == straight.tasks["math"].rows

    def test_without_restarts_the_other_worker_does_all(self, sample, straight, tmp_path, monkeypatch):
        monkeypatch.setattr("internlm2.eval.backends.ray_workers._MAX_RESTARTS", 0)
        (tmp_path / "flag").mkdir()
        build = partial(deadly, str(tmp_path / "flag"), "gsm8k:1", 1)
        assert comparable(over_ray(build, sample, tmp_path / "run")) == comparable(straight)

    def test_when_all_workers_are_gone_the_run_can_go_on(self, sample, straight, tmp_path, monkeypatch):
        monkeypatch.setattr("internlm2.eval.backends.ray_workers._MAX_RESTARTS", 0)
        (tmp_path / "flag").mkdir()
        build = partial(deadly, str(tmp_path / "flag"), "math:4", 99)
        with pytest.raises(EvalError, match=r"All workers are gone.*run the same command again"):
            over_ray(build, sample, tmp_path / "run")
        kept = len(read_samples(tmp_path / "run"))
        assert kept > 0
        results = over_ray(scripted, sample, tmp_path / "run")
        assert comparable(results) == comparable(straight)

    def test_the_command_line_asks_two_engines(self, words, tmp_path, capsys, monkeypatch, chat_folder):
        monkeypatch.chdir(chat_folder.parent)
        words[words.index(chat_folder)] = chat_folder.name
        assert internlm2(*words, "--output", tmp_path / "one") == 0
        expected = capsys.readouterr().out.splitlines()[1:3]
        assert internlm2(*words, "--output", tmp_path / "two", "--workers", 2) == 0
        assert capsys.readouterr().out.splitlines()[1:3] == expected
        assert verdicts(tmp_path / "two") == verdicts(tmp_path / "one")
        assert internlm2(*words, "--output", tmp_path / "two") == 0, "one process goes on where two were"

    def test_what_a_worker_cannot_load_is_said_as_by_one_process(self, sample, tmp_path):
        with pytest.raises(CheckpointError, match=r"There is no model here\. Give another folder\."):
            over_ray(unreadable, sample, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_workers_with_different_models_are_refused(self, sample, tmp_path):
        with pytest.raises(EvalError, match="The workers differ: name is 'model-"):
            over_ray(named_after_its_process, sample, tmp_path / "run")

    def test_more_workers_than_the_cluster_holds_are_refused(self, sample, tmp_path):
        with pytest.raises(EvalError, match="3 workers need 3 CPUs, but the Ray cluster has 2"):
            over_ray(scripted, sample, tmp_path / "run", num_workers=3)
        with pytest.raises(RequestError, match="workers is 0, but must be at least 1"):
            over_ray(scripted, sample, tmp_path / "run", num_workers=0)


def test_without_ray_the_pip_command_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "internlm2.eval.backends.ray_workers", raising=False)
    with pytest.raises(MissingDependencyError, match=r"pip install 'internlm2\[ray\]'"):
        __import__("internlm2.eval.backends.ray_workers")
