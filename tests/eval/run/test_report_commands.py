"""`internlm2 eval report` and `plot`: files that are written, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cyclopts import App
from test_results import finished

from internlm2.eval.data.folder import DataFolder
from internlm2.eval.questions import RunSettings
from internlm2.eval.results import Results, Row, TaskResult
from internlm2.eval.task import EvalError

Command = Callable[..., object]


@pytest.fixture
def command() -> Command:
    """Runs `report` or `plot` with words of a command line."""
    app = App(result_action="return_value")
    for name in ("report", "plot"):
        app.command(f"internlm2.cli.report:{name}")
    return lambda *words: app([str(word) for word in words], exit_on_error=False)


@pytest.fixture
def run(sample: DataFolder, tmp_path: Path) -> Path:
    return finished(sample, tmp_path / "run", RunSettings(("gsm8k", "math"), "fixed")).folder


def with_needle(folder: Path, score: float) -> Path:
    """A finished run with a needle test of four cells."""
    cells = {f"{n}-{depth}": Row(score - depth, None, 2) for n in (1000, 2000) for depth in (0, 50)}
    task = TaskResult("needle", {}, cells, 8, 0, 0, 0, 0, 0, 0, 1.0, "", {})
    results = Results({"name": "demo"}, "fixed", True, None, 0, False, True, {}, {"needle": task})
    folder.mkdir()
    (folder / "results.json").write_text(results.as_json())
    (folder / "samples.jsonl").touch()
    return folder


def test_a_page_is_written(command, run, tmp_path, capsys):
    out = tmp_path / "pages" / "run.html"
    command("report", run, "--out", out)
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert capsys.readouterr().out == f"{out}: {out.stat().st_size / 1e6:.1f} MB. Open it in a browser.\n"


def test_pictures_are_written(command, run, tmp_path, capsys):
    first, second = (with_needle(tmp_path / name, score) for name, score in (("a", 90.0), ("b", 70.0)))
    cases = [
        (("plot", run), "bars.png"),
        (("plot", first, "--needle", "needle"), "map.svg"),
        (("plot", first, second, "--needle", "needle"), "curves.png"),
        (("plot", first, "--needle", "needle", "--curve"), "curve.svg"),
    ]
    for words, name in cases:
        command(*words, "--out", tmp_path / name)
        assert capsys.readouterr().out == f"{tmp_path / name}\n"
        assert (tmp_path / name).stat().st_size > 5000
    sizes = {(tmp_path / name).read_bytes() for _, name in cases}
    assert len(sizes) == 4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["report"], "No run is given"),
        (["plot"], "No run is given"),
        (["report", "RUN", "--out", "page.txt"], r"must end in \.html"),
        (["report", "RUN", "RUN"], "The same run is given twice"),
        (["plot", "RUN", "--out", "bars.pdf"], r"must end in \.png or \.svg"),
        (["plot", "RUN", "--needle", "needle"], "has no needle test 'needle'. Needle tests in it: none"),
        (["report", "no/such/run"], r"There is no no/such/run/results\.json"),
    ],
)
def test_what_cannot_be_written_is_said(words, told, command, run, monkeypatch):
    monkeypatch.chdir(run.parent)
    before = set(run.parent.iterdir())
    with pytest.raises(EvalError, match=told):
        command(*(run if word == "RUN" else word for word in words))
    assert set(run.parent.iterdir()) == before


def test_the_page_of_the_documentation_uses_flags_that_exist(command):
    page = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    lines = [
        line.partition("#")[0].split()[2:] for line in page.splitlines() if line.startswith("internlm2 eval")
    ]
    commands = [words for words in lines if words[0] in ("report", "plot")]
    assert len(commands) == 4
    for words in commands:
        with pytest.raises(EvalError, match=r"There is no runs/"):
            command(*words)
