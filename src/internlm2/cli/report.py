"""`internlm2 eval report` and `internlm2 eval plot`: a page to browse runs with, and pictures of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from internlm2.eval.table import FinishedRun

Runs = Annotated[Path, Parameter(help="Folders of finished runs.")]
PAGE, PICTURE = Path("report.html"), Path("scores.png")


def report(
    *runs: Runs,
    out: Annotated[Path, Parameter(help="The file to write; one that is there is replaced.")] = PAGE,
    max_mb: Annotated[
        float | None,
        Parameter(help="Answers take at most so much: long texts lose their middle, then the last ones go."),
    ] = None,
) -> None:
    """Write one HTML file to browse runs with: table, settings, and every answer with filters. It loads nothing."""
    from internlm2.eval.report.page import page
    from internlm2.eval.report.page_data import MAX_BYTES
    from internlm2.eval.task import EvalError
    from internlm2.files import write_text

    if out.suffix.lower() not in (".html", ".htm"):
        raise EvalError(f"The file is {str(out)!r}, but must end in .html.")
    if max_mb is not None and not 0 < max_mb * 1e6 <= MAX_BYTES:
        raise EvalError(f"max_mb is {max_mb:g}, but must be above 0 and at most {MAX_BYTES / 1e6:g}.")
    write_text(out, page(_load(runs), max_bytes=MAX_BYTES if max_mb is None else int(max_mb * 1e6)))
    print(f"{out}: {out.stat().st_size / 1e6:,.1f} MB. Open it in a browser.")


def plot(
    *runs: Runs,
    out: Annotated[Path, Parameter(help="The picture to write, .png or .svg.")] = PICTURE,
    needle: Annotated[
        str | None,
        Parameter(help="Draw this needle test: one run as a map, several as curves over lengths."),
    ] = None,
    curve: Annotated[bool, Parameter(help="Draw one run as a curve, not as a map.", negative=())] = False,
) -> None:
    """Draw the model card's table as bars, or a needle test as a heat map or as curves over lengths."""
    from internlm2.eval.report.plots import plot_heat_map, plot_length_curve, plot_scores
    from internlm2.eval.table import headings
    from internlm2.eval.task import EvalError
    from internlm2.eval.tasks.long.grid import grid, is_grid

    found = _load(runs)
    if needle is None:
        if curve:
            raise EvalError("--curve is for needle tests. Name one with --needle, or leave --curve out.")
        plot_scores(found, out)
        print(out)
        return
    for run in found:
        if not is_grid(needle) or needle not in run.results.tasks:
            known = ", ".join(filter(is_grid, run.results.tasks)) or "none"
            raise EvalError(f"{run.folder} has no needle test {needle!r}. Needle tests in it: {known}.")
    rows = [grid(run.results.tasks[needle].subsets) for run in found]
    if len(found) == 1 and not curve:
        plot_heat_map(rows[0], out, title=f"{found[0].name}, {needle}")
    else:
        plot_length_curve(dict(zip(headings(found), rows, strict=True)), out, title=needle)
    print(out)


def _load(runs: tuple[Path, ...]) -> "list[FinishedRun]":
    from internlm2.eval.table import FinishedRun
    from internlm2.eval.task import EvalError

    if not runs:
        raise EvalError("No run is given. Name the folders that `internlm2 eval run` wrote.")
    return [FinishedRun.load(folder) for folder in runs]
