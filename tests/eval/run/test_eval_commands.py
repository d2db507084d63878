"""`internlm2 eval run`, `show` and `table`, from the command line to the screen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from endpoint_server import completion, serving

from internlm2.cli import main as cli


def internlm2(*words: object) -> int:
    return cli.run([str(word) for word in words])


@pytest.fixture(scope="module")
def folder(chat_folder, sample, tmp_path_factory):
    """A run of the tiny model over one question of perplexity and one of generation."""
    folder = tmp_path_factory.mktemp("eval") / "run"
    words = ["--tasks", "mmlu.abstract_algebra, bbh.boolean_expressions", "--limit", 1, "--data", sample.path]
    flags = ["--dtype", "float32", "--threads", 1, "--max-model-len", 3000, "--seed", 5]
    assert (
        internlm2("eval", "run", chat_folder, *words, "--output", folder, *flags, "--profile", "fixed") == 0
    )
    return folder


def test_a_run_prints_the_table_and_describes_the_model(folder, chat_folder, capsys):
    results = json.loads((folder / "results.json").read_text())
    assert (results["profile"], results["is_chat"], results["limit"], results["seed"]) == (
        "fixed",
        False,
        1,
        5,
    )
    facts = results["model"]
    assert (facts["name"], facts["dtype"], facts["device"], facts["max_model_len"]) == (
        str(chat_folder), "float32", "cpu", "3000",
    )  # fmt: skip
    assert len(facts["sha256"]) == 64
    capsys.readouterr()
    assert internlm2("eval", "table", folder) == 0
    assert "bbh.boolean_expressions" in capsys.readouterr().out
    assert internlm2("eval", "table", folder, folder, "--markdown") == 0
    assert capsys.readouterr().out.startswith("| benchmark | ")


def test_show_prints_the_samples_that_are_meant(folder, capsys):
    def shown(*words: object) -> str:
        capsys.readouterr()
        assert internlm2("eval", "show", folder, *words) == 0
        return capsys.readouterr().out

    assert shown().count("=== ") == 2
    assert shown("--limit", 1).count("=== ") == 1
    assert shown("--task", "bbh").startswith("=== bbh.boolean_expressions:")
    assert shown("--task", "mmlu.abstract_algebra", "--whole").count("Answer: ") == 6
    assert "right\n" not in shown("--wrong")
    capsys.readouterr()
    assert internlm2("eval", "show", folder, "--errors") == 0
    assert capsys.readouterr() == ("", "There is no such sample.\n")


def endpoint_words(server, sample, output) -> list[object]:
    words = ["eval", "run", "tiny", "--endpoint", server.url, "--tasks", "gsm8k", "--data", sample.path]
    return [*words, "--output", output]


def test_an_endpoint_is_evaluated_with_the_key_of_the_environment(sample, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", "secret")
    with serving(lambda path, body: (200, completion("The answer is 18"))) as server:
        words = [*endpoint_words(server, sample, tmp_path / "run"), "--chat", "--api-key-env", "MY_KEY"]
        assert internlm2(*words) == 0
    assert "GSM8K" in capsys.readouterr().out
    assert {headers["Authorization"] for _, headers, _ in server.seen} == {"Bearer secret"}
    assert {path for path, _, _ in server.seen} == {"/v1/chat/completions"}
    assert not any("secret" in file.read_text() for file in (tmp_path / "run").iterdir())


def test_questions_without_a_verdict_give_exit_code_1(sample, tmp_path, capsys):
    def reply(path, body):
        return (400, {"error": "no"}) if "Janet" in body["prompt"] else (200, completion("18"))

    with serving(reply) as server:
        words = endpoint_words(server, sample, tmp_path / "run")
        assert internlm2(*words) == 1
        assert "(1 errors)" in capsys.readouterr().out
        assert internlm2("eval", "show", tmp_path / "run", "--errors") == 0
        assert "The endpoint answered 400: " in capsys.readouterr().out
        assert internlm2(*words, "--profile", "fixed") == 2
    assert 'settings.profile was "card-2024-02" and is "fixed"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tasks", "gsm9k"], "There is no benchmark 'gsm9k'"),
        (["--tasks", "mmlu.anatomy"], "mmlu/dev/anatomy_dev.csv is not in"),
        (["--temperature", "1"], "temperature is 1.0, but benchmarks fix it. Leave --temperature out."),
        (["--max-tokens", "9"], "max_tokens is 9, but benchmarks fix it."),
        (
            ["--endpoint", "http://h/v1", "--dtype", "float32"],
            "dtype is 'float32', but an endpoint decides it.",
        ),
        (
            ["--endpoint", "http://h/v1", "--api-key-env", "NO_SUCH"],
            "The environment variable NO_SUCH is not set.",
        ),
        (["--endpoint", "h"], "The endpoint is 'h', but must be like"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_run_is_said_before_a_model_is_loaded(words, told, sample, tmp_path, capsys):
    tasks = [] if "--tasks" in words else ["--tasks", "gsm8k"]
    where = ["--data", sample.path, "--output", tmp_path / "run"]
    assert internlm2("eval", "run", "/no/such/model", *where, *tasks, *words) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_folders_that_are_no_runs_are_named(tmp_path, capsys):
    for words in (["show", tmp_path], ["table", tmp_path], ["table"]):
        assert internlm2("eval", *words) == 2
    told = capsys.readouterr().err
    assert f"There is no {tmp_path / 'samples.jsonl'}. Give the folder of a run." in told
    assert f"There is no {tmp_path / 'results.json'}." in told
    assert "No run is given." in told


@pytest.mark.parametrize("words", [["run"], ["show"], ["table"]], ids=" ".join)
def test_help_imports_no_torch(words):
    code = (
        "import sys; from internlm2.cli.main import run; rc = run(['eval', *sys.argv[1:], '--help']);"
        "sys.exit(rc or bool({'torch', 'numpy', 'internlm2.eval'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Usage: internlm2 eval {words[0]}" in done.stdout


def test_the_page_evaluates_a_model_from_python(sample, tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    script = page.split("```python\n")[2].partition("```")[0]
    script = script.replace('DataFolder("data")', f"DataFolder({str(sample.path)!r})")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("33.33")


def test_the_page_uses_flags_that_exist(sample, tmp_path, capsys):
    page = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    lines = [
        line.partition("#")[0].split() for line in page.splitlines() if line.startswith("internlm2 eval")
    ]
    commands = [words[2:] for words in lines if words[2] in ("run", "show", "table")]
    assert len(commands) >= 7
    for words in commands:
        given = [str(sample.path / "none") if word == "data" else word for word in words]
        assert internlm2("eval", *given) == 2
        told = capsys.readouterr().err
        assert any(one in told for one in ("is not in", "There is no runs/", "put its tokenizer.model")), told


def test_a_folder_that_cannot_be_gone_on_with_is_refused_before_a_model_is_loaded(
    folder, sample, tmp_path, capsys
):
    def refused(output: Path, *words: object) -> str:
        flags = ["--tasks", "gsm8k", "--limit", 1, "--data", sample.path, *words]
        before = {path: path.read_bytes() for path in output.rglob("*.*")}
        assert internlm2("eval", "run", tmp_path / "no-model", *flags, "--output", output) == 2
        assert {path: path.read_bytes() for path in output.rglob("*.*")} == before
        return capsys.readouterr().err

    capsys.readouterr()
    assert 'settings.profile was "fixed" and is "card-2024-02"' in refused(folder)
    (tmp_path / "file").write_text("")
    assert "is a file where a folder is needed" in refused(tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    assert "holds something else than a run" in refused(tmp_path / "full")
    shard = tmp_path / "split" / "shards" / "1-of-2"
    shard.mkdir(parents=True)
    (shard / "thesis.tex").write_text("")
    assert "1-of-2 holds something else than a run" in refused(tmp_path / "split", "--shard", "1/2")
    assert "No model at" in refused(tmp_path / "new"), "a good folder is no reason"
    assert not (tmp_path / "new").exists()


def test_what_would_be_ignored_is_refused(folder, sample, tmp_path, capsys):
    words = [
        "--tasks",
        "gsm8k",
        "--data",
        sample.path,
        "--output",
        tmp_path / "run",
        "--api-key-env",
        "MY_KEY",
    ]
    assert internlm2("eval", "run", tmp_path / "no-model", *words) == 2
    assert "no endpoint is given. Give --endpoint" in capsys.readouterr().err
    assert internlm2("eval", "show", folder, "--limit", 0) == 2
    assert "limit is 0, but must be at least 1" in capsys.readouterr().err
    assert internlm2("eval", "show", folder, "--task", "gsm8k") == 2
    assert "'gsm8k'. Tasks with samples: bbh, mmlu." in capsys.readouterr().err
    assert internlm2("eval", "plot", folder, "--curve", "--out", tmp_path / "scores.png") == 2
    assert "--curve is for needle tests" in capsys.readouterr().err
    assert not (tmp_path / "scores.png").exists()
