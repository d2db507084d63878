"""Pictures of results as PNG or SVG: the card's table as bars, length curves, the needle's heat map.

The one file that imports matplotlib. Nothing of it is global here: each picture is a figure of its own. Text is text,
whatever signs of formulas it holds.
"""

import io
import math
import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from internlm2.errors import MissingDependencyError
from internlm2.eval.published_scores import CARD_NAMES, PUBLISHED, nearest
from internlm2.eval.report.forms import visible
from internlm2.eval.table import FinishedRun, headings
from internlm2.eval.task import EvalError
from internlm2.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg")
CHINESE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "SimHei",
    "Arial Unicode MS",
)  # fmt: skip
_COLOURS = ("#2a6fbb", "#d98324", "#3f9a5c", "#b3446c", "#6b58a8", "#7d7d7d")
_CARD_COLOUR = "#222222"
_CELLS_WITH_NUMBERS = 200
MAX_LABEL = 40  # characters of a name or title
_Number = TypeVar("_Number", int, float)


class Point(Protocol):
    """A mean at one place of a grid, such as `eval.tasks.long.grid.GridRow`."""

    @property
    def length(self) -> int:
        """In tokens."""
        ...

    @property
    def depth(self) -> int:
        """Of the needle, in percent."""
        ...

    @property
    def score(self) -> float:
        """In percent."""
        ...

    @property
    def n(self) -> int:
        """Questions that it is the mean of."""
        ...


Rows = Sequence[Point]


def plot_scores(runs: Sequence[FinishedRun], path: Path) -> None:
    """The card's table as bars with their standard errors; short black lines are the card's own numbers.

    Benchmarks that no run has whole are left out, as are runs that lack one. Raises EvalError where nothing is left.
    """
    tasks = [name for name in CARD_NAMES if any(_row(run, name) for run in runs)]
    tasks += sorted({name for run in runs for name in run.results.tasks if _row(run, name)} - set(tasks))
    if not tasks:
        raise EvalError(
            "No run has a whole benchmark, so there is nothing to draw. See `internlm2 eval table`."
        )
    names = headings(runs)

    def draw(axes: "Axes") -> None:
        width = 0.8 / len(runs)
        has_card = False
        for n, (run, name) in enumerate(zip(runs, names, strict=True)):
            published = PUBLISHED[nearest(run.name, is_chat=run.results.is_chat)]
            left = (n + 0.5) * width - 0.4
            found = [(place, row) for place, task in enumerate(tasks) if (row := _row(run, task)) is not None]
            places = [place + left for place, _ in found]
            axes.bar(
                places, [row[0] for _, row in found], width * 0.92, yerr=[row[1] for _, row in found],
                color=_COLOURS[n % len(_COLOURS)], ecolor="#555555", capsize=2, label=_label(name),
            )  # fmt: skip
            for place, (_, (percent, error)) in zip(places, found, strict=True):
                axes.text(place, percent + error + 1, f"{percent:.1f}", ha="center", fontsize=7)
            card = [(place, published[tasks[int(task)]]) for place, (task, _) in zip(places, found, strict=True)
                    if tasks[int(task)] in published]  # fmt: skip
            if card:
                axes.hlines(
                    [score for _, score in card], [place - width * 0.46 for place, _ in card],
                    [place + width * 0.46 for place, _ in card], color=_CARD_COLOUR, linewidth=1.6,
                    label="_" if has_card else "model card (nearest model)",
                )  # fmt: skip
                has_card = True
        num_columns = 3 if max(map(len, names)) < 20 else 1
        axes.set_xticks(range(len(tasks)), [CARD_NAMES.get(task, task) for task in tasks])
        axes.set_ylim(0, 105)
        axes.set_ylabel("score in percent ± standard error")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.legend(
            fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=num_columns, frameon=False
        )

    _save(path, draw, width=max(5.0, 1.5 + 0.45 * len(tasks) * (1 + len(runs))), height=4.6)


def plot_length_curve(rows: Rows | Mapping[str, Rows], path: Path, *, title: str = "") -> None:
    """The mean score at each length, with a band of one standard error over the depths.

    rows: of one curve, or of several by name. path: ends in .png or .svg. Raises EvalError for rows that make no sense.
    """
    curves = rows if isinstance(rows, Mapping) else {"": rows}
    means = {name: _means(own) for name, own in curves.items()}
    if not means:
        raise EvalError("There are no rows to draw.")

    def draw(axes: "Axes") -> None:
        for n, (name, own) in enumerate(means.items()):
            colour = _COLOURS[n % len(_COLOURS)]
            lengths = list(own)
            axes.plot(
                lengths,
                [mean for mean, _ in own.values()],
                "o-",
                color=colour,
                markersize=4,
                label=_label(name),
            )
            low, high = ([mean + sign * error for mean, error in own.values()] for sign in (-1, 1))
            axes.fill_between(lengths, low, high, color=colour, alpha=0.2, linewidth=0)
        every = sorted({length for own in means.values() for length in own})
        if every[0] > 0 and every[-1] > 16 * every[0]:
            axes.set_xscale("log", base=2)
        axes.set_xticks(_thinned(every, 10), [_length(one) for one in _thinned(every, 10)])
        axes.minorticks_off()
        axes.set_ylim(-2, 102)
        axes.set_xlabel("length in tokens")
        axes.set_ylabel("score in percent ± standard error")
        axes.grid(alpha=0.3)
        axes.set_title(_label(title), fontsize=10)
        if any(means):
            axes.legend(fontsize=8)

    _save(path, draw, width=6.4, height=4.0)


def plot_heat_map(rows: Rows, path: Path, *, title: str = "") -> None:
    """The needle's map: lengths across, depths down, the mean score as colour; cells without a row are hatched.

    rows: several of one place, such as of two languages, are averaged. path: ends in .png or .svg.
    Raises EvalError for rows that make no sense.
    """
    _check(rows)
    cells: dict[tuple[float, float], list[Point]] = defaultdict(list)
    for row in rows:
        cells[row.depth, row.length].append(row)
    lengths, depths = (sorted({key[n] for key in cells}) for n in (1, 0))
    grid = [[_mean(cells[d, n]) if (d, n) in cells else math.nan for n in lengths] for d in depths]
    mean, num_questions = _mean(rows), sum(row.n for row in rows)

    def draw(axes: "Axes") -> None:
        axes.set_facecolor("#e6e6e6")
        axes.patch.set_hatch("///")
        image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
        for ticks, values, text in (
            (axes.set_xticks, lengths, _length),
            (axes.set_yticks, depths, "{:g}".format),
        ):
            chosen = _thinned(range(len(values)), 21)
            ticks(chosen, [text(values[n]) for n in chosen])
        axes.tick_params(axis="x", rotation=45 if len(lengths) > 8 else 0, labelsize=8)
        if len(lengths) * len(depths) <= _CELLS_WITH_NUMBERS:
            for y, line in enumerate(grid):
                for x, value in enumerate(line):
                    if not math.isnan(value):
                        colour = "black" if value > 60 else "white"
                        axes.text(x, y, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=7)
        axes.set_xlabel("length in tokens")
        axes.set_ylabel("depth of the needle in percent")
        told = f"mean {mean:.1f} % of {num_questions:,} questions"
        axes.set_title(f"{_label(title)}: {told}" if title else told, fontsize=10)
        axes.figure.colorbar(image, ax=axes, label="score in percent")

    _save(path, draw, width=min(16.0, 3.5 + 0.42 * len(lengths)), height=min(8.0, 2.2 + 0.3 * len(depths)))


def _row(run: FinishedRun, task: str) -> tuple[float, float] | None:
    """Percent and standard error of a whole benchmark."""
    result = run.results.tasks.get(task)
    row = None if result is None else result.rows.get(task)
    return None if row is None else (row.percent, row.standard_error or 0.0)


def _check(rows: Rows) -> None:
    if not rows:
        raise EvalError("There are no rows to draw.")
    for row in rows:
        if not (
            math.isfinite(row.length) and math.isfinite(row.depth) and 0 <= row.score <= 100 and row.n > 0
        ):
            raise EvalError(f"{row} cannot be drawn: a score is from 0 to 100, of at least one question.")


def _mean(rows: Rows) -> float:
    """Over all questions."""
    return math.fsum(row.score * row.n for row in rows) / sum(row.n for row in rows)


def _means(rows: Rows) -> dict[float, tuple[float, float]]:
    """Mean in percent and its standard error over the rows, by length in their order."""
    _check(rows)
    found: dict[float, list[Point]] = defaultdict(list)
    for row in rows:
        found[row.length].append(row)
    return {length: (_mean(own), _error([row.score for row in own])) for length, own in sorted(found.items())}


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _thinned(values: Sequence[_Number], most: int) -> list[_Number]:
    """Some of many values, evenly from the last backwards, and the first where it is not near its neighbour."""
    step = math.ceil(len(values) / most)
    chosen = list(values[::-1][::step][::-1])
    first_gap = (len(values) - 1) % step
    return [values[0], *chosen] if first_gap >= max(1, step / 2) else chosen


def _label(text: str) -> str:
    """Of a length that leaves room for the picture."""
    shown = visible(text, keep="")
    return shown if len(shown) <= MAX_LABEL else f"{shown[: MAX_LABEL - 1]}…"


def _length(tokens: float) -> str:
    return f"{tokens / 1000:g}K" if tokens >= 1000 else f"{tokens:g}"


def _save(path: Path, draw: Callable[["Axes"], None], *, width: float, height: float) -> None:
    """Draw into a new figure and write it. Raises EvalError for a name of another format."""
    if path.suffix.lower() not in FORMATS:
        raise EvalError(f"The picture is {str(path)!r}, but must end in .png or .svg.")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
        from matplotlib.font_manager import fontManager
    except ImportError as error:
        raise MissingDependencyError(
            "Pictures need matplotlib, which is not installed. Install it with: pip install 'internlm2[plot]'"
        ) from error
    known = {font.name for font in fontManager.ttflist}
    settings = {
        "font.family": ["DejaVu Sans", *(name for name in CHINESE_FONTS if name in known)],
        "text.parse_math": False,
        "svg.hashsalt": "internlm2",
        "hatch.color": "#bbbbbb",
    }
    content = io.BytesIO()
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # shown as a box
        figure: Figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        form = path.suffix.lower().removeprefix(".")
        metadata = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(content, format=form, dpi=150, metadata=metadata)
    write_bytes(path, content.getvalue())
