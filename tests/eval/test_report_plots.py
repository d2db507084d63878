"""Pictures of results: what they hold, read back from the picture or from the figure."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from PIL import Image

from internlm2.errors import MissingDependencyError
from internlm2.eval.report import plots
from internlm2.eval.report.plots import plot_heat_map, plot_length_curve, plot_scores
from internlm2.eval.results import Results, Row, TaskResult
from internlm2.eval.table import FinishedRun
from internlm2.eval.task import EvalError
from internlm2.eval.tasks.long.grid import GridRow


def cell(length: int, depth: int, score: float, n: int = 2) -> GridRow:
    return GridRow("", length, depth, score, n)


ROWS = [
    cell(length, depth, 0.0 if depth == 50 and length == 32000 else 100.0)
    for length in (1000, 16000, 32000)
    for depth in (0, 50, 100)
]


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self, *arguments, **more):
        figures.append(self)
        return save(self, *arguments, **more)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def finished(name: str, **percents: float) -> FinishedRun:
    tasks = {
        task: TaskResult(task, {task: Row(percent, 1.5, 100)}, {}, 100, 0, 0, 0, 0, 0, 0, 1.0, "", {})
        for task, percent in percents.items()
    }
    return FinishedRun(
        Path(name), Results({"name": name}, "fixed", True, None, 0, False, True, {}, tasks), {}
    )


def test_the_heat_map_has_the_mean_of_each_cell(drawn, tmp_path):
    rows = [*ROWS, cell(1000, 0, 0.0, n=1)]  # two languages in one cell
    plot_heat_map([row for row in rows if (row.length, row.depth) != (16000, 100)], tmp_path / "map.png")
    axes = drawn[0].axes[0]
    values = axes.images[0].get_array()
    assert values is not None
    assert values.filled(-1).tolist() == [
        [pytest.approx(200 / 3), 100, 100], [100, 100, 0], [100, -1, 100],
    ], "depths down, lengths across, -1 where there is no row"  # fmt: skip
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1K", "16K", "32K"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "50", "100"]
    assert sorted(text.get_text() for text in axes.texts) == [
        "0",
        "100",
        "100",
        "100",
        "100",
        "100",
        "100",
        "67",
    ]
    assert axes.get_title() == "mean 82.4 % of 17 questions"
    image = Image.open(tmp_path / "map.png")
    assert image.format == "PNG"
    assert len(image.convert("RGB").resize((60, 60)).getcolors(3600) or []) > 20, "not an empty picture"


def test_the_grid_of_the_protocol_has_readable_ticks(drawn, tmp_path):
    rows = [cell(n, depth, 100.0) for n in range(1000, 200_001, 1000) for depth in range(0, 101, 5)]
    plot_heat_map(rows, tmp_path / "map.png")
    labels = [label.get_text() for label in drawn[0].axes[0].get_xticklabels()]
    assert labels == ["1K", *(f"{n}K" for n in range(10, 201, 10))]
    assert len(drawn[0].axes[0].get_yticklabels()) == 21
    assert not drawn[0].axes[0].texts


def test_the_curve_has_means_with_errors_in_the_order_of_lengths(drawn, tmp_path):
    plot_length_curve({"first": ROWS[::-1], "second": ROWS[:3]}, tmp_path / "curve.svg", title="needle")
    axes = drawn[0].axes[0]
    first, second = axes.lines
    assert first.get_xdata().tolist() == [1000, 16000, 32000]
    assert first.get_ydata().tolist() == [100, 100, pytest.approx(200 / 3)]
    assert second.get_xdata().tolist() == [1000]
    band = axes.collections[0].get_paths()[0].vertices
    error = 100 * (sum((x - 2 / 3) ** 2 for x in (1, 0, 1)) / 2 / 3) ** 0.5
    assert band[:, 1].min() == pytest.approx(200 / 3 - error)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["first", "second"]


def test_the_bars_are_the_scores_beside_the_card(drawn, tmp_path):
    runs = [finished("internlm2-chat-20b", gsm8k=50.0, mmlu=60.0), finished("demo", gsm8k=3.0, other=10.0)]
    plot_scores(runs, tmp_path / "bars.png")
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["MMLU", "GSM8K", "other"]
    first, second = (one for one in axes.containers if hasattr(one, "datavalues"))
    assert (list(first.datavalues), list(second.datavalues)) == ([60, 50], [3, 10])
    low = first.errorbar.lines[2][0].get_segments()[0]
    assert [y for _, y in low] == [58.5, 61.5]
    cards = [
        segment[0][1]
        for lines in axes.collections
        for segment in lines.get_segments()
        if segment[0][1] == segment[1][1]
    ]
    assert {79.6, 66.5, 70.7} <= set(cards)
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["model card (nearest model)", "internlm2-chat-20b", "demo"]


@pytest.mark.parametrize(
    "title",
    ["大海捞针 中文", "a$b_c$ \\frac{1", "<b>&amp;</b> --> \x00\x1b\u202e", "😀" * 50],
    ids=["chinese", "formulas", "markup", "long"],
)
def test_any_title_is_text_in_both_formats(title, tmp_path, recwarn):
    for form in ("png", "svg"):
        plot_heat_map(ROWS, tmp_path / f"map.{form}", title=title)
        plot_length_curve({title: ROWS}, tmp_path / f"curve.{form}")
        plot_scores([finished(title, gsm8k=1.0)], tmp_path / f"bars.{form}")
    for path in tmp_path.glob("*.svg"):
        names = {element.tag.rpartition("}")[2] for element in ElementTree.parse(path).iter()}
        assert not names & {"script", "foreignObject", "a", "b"}
    assert not recwarn.list


def test_without_a_chinese_font_nothing_breaks(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(plots, "CHINESE_FONTS", ())
    plot_heat_map(ROWS, tmp_path / "map.png", title="大海捞针")
    assert not recwarn.list


def test_the_same_picture_is_the_same_file(tmp_path):
    for form in ("png", "svg"):
        for name in ("a", "b"):
            plot_heat_map(ROWS, tmp_path / f"{name}.{form}")
        assert (tmp_path / f"a.{form}").read_bytes() == (tmp_path / f"b.{form}").read_bytes()


@pytest.mark.parametrize(
    "rows", [[], [cell(1, 1, 100.1)], [cell(1, 1, float("nan"))], [cell(1, 1, 50.0, n=0)], [cell(1, 1, -1.0)]]
)
def test_rows_that_make_no_sense_are_refused(rows, tmp_path):
    told = "cannot be drawn: a score is from 0 to 100" if rows else "There are no rows to draw"
    for plot in (plot_heat_map, plot_length_curve):
        with pytest.raises(EvalError, match=told):
            plot(rows, tmp_path / "map.png")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_drawn_is_said(tmp_path, monkeypatch):
    with pytest.raises(EvalError, match=r"must end in \.png or \.svg"):
        plot_heat_map(ROWS, tmp_path / "map.pdf")
    with pytest.raises(EvalError, match="There are no rows to draw"):
        plot_length_curve({}, tmp_path / "curve.png")
    with pytest.raises(EvalError, match="No run has a whole benchmark"):
        plot_scores([finished("demo")], tmp_path / "bars.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'internlm2\[plot\]'"):
        plot_heat_map(ROWS, tmp_path / "map.png")


def test_tables_and_pages_need_no_matplotlib():
    code = "import sys; import internlm2.eval.report.page, internlm2.eval.table, internlm2.eval.report.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
