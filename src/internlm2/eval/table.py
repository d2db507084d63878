"""Results for people: the card's table, and single samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from internlm2.eval.published_scores import CARD_NAMES, PUBLISHED, nearest
from internlm2.eval.report.forms import Table, render, visible
from internlm2.eval.results import Results, Row, TaskResult
from internlm2.eval.run_folder import Sample, read_samples
from internlm2.eval.significance import Comparison, compare

NO_VALUE = ""
_PROMPT_CHARACTERS = 600


@dataclass(frozen=True)
class FinishedRun:
    """A run as tables show it."""

    folder: Path
    results: Results
    samples: Mapping[str, Sample]

    @staticmethod
    def load(folder: Path) -> "FinishedRun":
        """Read a run. Raises EvalError where there is none, or it is not finished."""
        return FinishedRun(folder, Results.load(folder), read_samples(folder))

    @property
    def name(self) -> str:
        """The model's name."""
        return str(self.results.model["name"])


def table(runs: Sequence[FinishedRun], *, form: str = "text") -> str:
    """The card's table as "text", "markdown" or "latex"; see `card_table`."""
    return render(card_table(runs), form)


def card_table(runs: Sequence[FinishedRun]) -> Table:
    """The card's table: a row for each benchmark, a column for each run, then the card's own numbers.

    Two runs are also compared, on the questions that both have a verdict on, every question alike: their difference,
    p (how likely one as large is by chance), and how many questions these are.
    """
    published = list(dict.fromkeys(nearest(run.name, is_chat=run.results.is_chat) for run in runs))
    head = ["benchmark", *headings(runs), *(["difference", "p", "n of both"] if len(runs) == 2 else [])]
    head += [f"card: {model}" for model in published]
    rows, tests = [], []
    for task, row in _row_names(runs):
        cells = [_cell(run.results.tasks.get(task), row) for run in runs]
        if len(runs) == 2:
            found = _compared(runs, task, row)
            cells += _comparison_cells(found)
            tests += [found.test] if found else []
        for model in published:
            score = PUBLISHED[model].get(row)
            cells.append(NO_VALUE if score is None else f"{score:.1f}")
        rows.append([CARD_NAMES.get(row, row), *cells])
    told = [
        f"p: {test}, over the questions that both runs have a verdict on" for test in dict.fromkeys(tests)
    ]
    return Table(head, rows, [*(note for run in runs for note in _notes(run)), *told])


def headings(runs: Sequence[FinishedRun]) -> list[str]:
    """Models by name; runs of the same model by their folders."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else f"{run.name} ({run.folder.name})" for run in runs]


def _row_names(runs: Sequence[FinishedRun]) -> list[tuple[str, str]]:
    """Tasks in the card's order, each with its row; the subsets instead where no run has the whole task."""
    known = [*CARD_NAMES, *sorted({task for run in runs for task in run.results.tasks} - set(CARD_NAMES))]
    found: list[tuple[str, str]] = []
    for task in known:
        results = [run.results.tasks[task] for run in runs if task in run.results.tasks]
        if any(task in result.rows for result in results):
            found.append((task, task))
        else:
            subsets = dict.fromkeys(name for result in results for name in result.subsets)
            found += [(task, f"{task}.{name}" if name else task) for name in subsets] or (
                [(task, task)] if results else []
            )
    return found


def _cell(result: TaskResult | None, row: str) -> str:
    if result is None:
        return "not run"
    found: Row | None = result.rows.get(row) or result.subsets.get(row.partition(".")[2])
    failed = f" ({result.num_errors} errors)" if result.num_errors else ""
    if found is None:
        return f"incomplete{failed}"
    error = "" if found.standard_error is None else f" ± {found.standard_error:.1f}"
    return f"{found.percent:.1f}{error}{failed}"


def _compared(runs: Sequence[FinishedRun], task: str, row: str) -> Comparison | None:
    subset = None if row == task else row.partition(".")[2]
    return compare(runs[0].samples, runs[1].samples, task=task, subset=subset)


def _comparison_cells(found: Comparison | None) -> list[str]:
    if found is None:
        return [NO_VALUE, NO_VALUE, "0"]
    error = "" if found.standard_error is None else f" ± {found.standard_error:.1f}"
    p_value = "< 0.0001" if found.p_value < 1e-4 else f"{found.p_value:.4f}"
    return [f"{found.difference:+.1f}{error}", p_value, str(found.n)]


def _notes(run: FinishedRun) -> list[str]:
    results = run.results
    asked = sum(task.num_questions for task in results.tasks.values())
    mode = "chat" if results.is_chat else "base"
    notes = [
        f"{run.folder}: {run.name}, profile {results.profile}, {mode} mode, {asked} questions ({results.which})"
    ]
    for task in results.tasks.values():
        if task.num_errors:
            failed = f"{task.name}: {task.num_errors} questions have no verdict: see `internlm2 eval show RUN --errors`"
            notes.append(f"{run.folder}: {failed}")
        notes += [f"{run.folder}: {told}" for told in task.shortenings]
    if not results.keeps_context_limit:
        notes.append(f"{run.folder}: the context limit of the profile was not kept: tokens were not known")
    return notes


def sample_text(sample: Sample, *, is_whole: bool = False) -> str:
    """One sample for the terminal; what a model wrote cannot move the cursor there. is_whole: all of the prompt."""
    prompt = sample.prompt
    if not is_whole and len(prompt) > _PROMPT_CHARACTERS:
        left_out = len(prompt) - _PROMPT_CHARACTERS
        prompt = f"[{left_out} characters before this; --whole shows them]\n{prompt[left_out:]}"
    verdict = "error" if sample.error else {1.0: "right", 0.0: "wrong"}.get(sample.score, f"{sample.score:g}")
    facts = [
        (sample.dropped_shots, f"{sample.dropped_shots} examples dropped"),
        (sample.cut_tokens, f"{sample.cut_tokens} tokens cut from the prompt"),
        (sample.finish_reason == "length", "the answer was cut"),
    ]
    told = "".join(f", {text}" for holds, text in facts if holds)
    lines = [
        f"=== {sample.key}: {verdict}{told}",
        prompt,
        "--- answer",
        sample.output,
        f"--- read as {sample.extracted!r}, right is {sample.gold!r}",
    ]
    lines += [sample.error] if sample.error else []
    return "\n".join(map(visible, lines))
