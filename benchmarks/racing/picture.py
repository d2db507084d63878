"""The picture: a panel for every cell, a bar for every engine, ours in colour, ranges as whiskers."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from racing.course import HEATS, Cell
from racing.engines import OURS, find
from racing.samples import Samples, Spread

OUR_COLOR, PEER_COLOR, TEXT_COLOR = "#1f6f5c", "#b9b3a6", "#333333"
_COLUMNS = 2
Panel = tuple[str, list[tuple[str, bool, Spread]]]  # title; engine, whether it is ours, tokens per second


def panels(samples: Samples) -> list[Panel]:
    """What is drawn: cells of a shape with one of ours and a peer; heats of one cell share a panel."""
    merged: dict[tuple[str, Cell], list[str]] = {}
    for heat in HEATS:
        for cell, names in heat.cells:
            known = merged.setdefault((heat.shape, cell), [])
            known.extend(name for name in names if name not in known)
    found: list[Panel] = []
    for (shape, cell), names in merged.items():
        bars = []
        for name in names:
            speed = samples.spread(shape, cell.name, name, lambda s: s.speed)
            if speed is not None:
                bars.append((name, find(shape, name).peer == OURS, speed))
        if {is_ours for _, is_ours, _ in bars} == {True, False}:
            found.append((f"{shape}: {cell.name}", sorted(bars, key=lambda bar: bar[2].median)))
    return found


def draw(samples: Samples, target: Path) -> None:
    """Write an SVG; nothing is written without samples."""
    shown = panels(samples)
    if not shown:
        return
    num_rows = -(-len(shown) // _COLUMNS)
    heights = [
        max(len(bars) for _, bars in shown[row * _COLUMNS : (row + 1) * _COLUMNS]) for row in range(num_rows)
    ]
    settings = {"font.size": 9, "text.color": TEXT_COLOR, "svg.hashsalt": "race", "font.family": "sans-serif"}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(11, sum(0.32 * height + 0.75 for height in heights)), layout="constrained")
        axes = figure.subplots(num_rows, _COLUMNS, squeeze=False, height_ratios=[h + 1.5 for h in heights])
        for n, axis in enumerate(axes.flat):
            if n < len(shown):
                _panel(axis, *shown[n])
            else:
                axis.set_axis_off()
        figure.savefig(target, format="svg", metadata={"Date": None})


def _panel(axis: Axes, title: str, bars: list[tuple[str, bool, Spread]]) -> None:
    speeds = [speed for _, _, speed in bars]
    axis.barh(
        [name for name, _, _ in bars],
        [speed.median for speed in speeds],
        color=[OUR_COLOR if is_ours else PEER_COLOR for _, is_ours, _ in bars],
        xerr=[[s.median - s.low for s in speeds], [s.high - s.median for s in speeds]],
        error_kw={"ecolor": TEXT_COLOR, "elinewidth": 0.8},
        height=0.7,
    )
    room = max(speed.high for speed in speeds)
    for at, speed in enumerate(speeds):
        axis.text(speed.high + 0.015 * room, at, f"{speed.median:.3g}", va="center", color=TEXT_COLOR)
    axis.set_xlim(0, room * 1.12)
    axis.set_title(f"{title}, tokens/s", loc="left", fontsize=9, fontweight="bold")
    axis.xaxis.set_visible(False)
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)
