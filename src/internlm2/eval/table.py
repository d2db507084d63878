"""Results for people: the card's table as text or Markdown, and single samples."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from internlm2.eval.published_scores import CARD_NAMES, PUBLISHED, nearest
from internlm2.eval.results import Results, Row, TaskResult, compare
from internlm2.eval.run_folder import Sample, read_samples

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


def table(runs: Sequence[FinishedRun], *, is_markdown: bool = False) -> str:
    """The card's table: a row for each benchmark, a column for each run, then the card's own numbers.

    Two runs get a column p as well: how likely their difference is by chance (McNemar, exact, every question alike).
    """
    published = list(dict.fromkeys(nearest(run.name, is_chat=run.results.is_chat) for run in runs))
    head = ["benchmark", *_headings(runs), *(["p"] if len(runs) == 2 else [])]
    head += [f"card: {model}" for model in published]
    rows = []
    for task, row in _row_names(runs):
        cells = [_cell(run.results.tasks.get(task), row) for run in runs]
        if len(runs) == 2:
            cells.append(_p_value(runs, task, row))
        for model in published:
            score = PUBLISHED[model].get(row)
            cells.append(NO_VALUE if score is None else f"{score:.1f}")
        rows.append([CARD_NAMES.get(row, row), *cells])
    lines = _markdown(head, rows) if is_markdown else _text(head, rows)
    bullet = "- " if is_markdown else ""
    return "\n".join([*lines, "", *(f"{bullet}{line}" for run in runs for line in _notes(run))])


def _headings(runs: Sequence[FinishedRun]) -> list[str]:
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


def _p_value(runs: Sequence[FinishedRun], task: str, row: str) -> str:
    subset = None if row == task else row.partition(".")[2]
    found = compare(runs[0].samples, runs[1].samples, task=task, subset=subset)
    if found is None:
        return "nothing in common"
    return "< 0.0001" if found.p_value < 1e-4 else f"{found.p_value:.4f}"


def _notes(run: FinishedRun) -> list[str]:
    results = run.results
    which = (
        "all questions" if results.limit is None else f"{results.limit} of each subset, seed {results.seed}"
    )
    asked = sum(task.num_questions for task in results.tasks.values())
    mode = "chat" if results.is_chat else "base"
    notes = [f"{run.folder}: {run.name}, profile {results.profile}, {mode} mode, {asked} questions ({which})"]
    for task in results.tasks.values():
        told = [
            (task.num_errors, "have no verdict: see `internlm2 eval show RUN --errors`"),
            (task.num_dropped_shots, "lost worked examples to the context limit"),
            (task.num_cut_prompts, "lost the beginning of their prompt to it"),
        ]
        notes += [f"{run.folder}: {task.name}: {count} questions {what}" for count, what in told if count]
    if not results.keeps_context_limit:
        notes.append(f"{run.folder}: the context limit of the profile was not kept: tokens were not known")
    return notes


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[n]) for line in (head, *rows)) for n in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *rows)
    ]


def sample_text(sample: Sample, *, is_whole: bool = False) -> str:
    """One sample for the terminal; what a model wrote cannot move the cursor there. is_whole: all of the prompt."""
    prompt = sample.prompt
    if not is_whole and len(prompt) > _PROMPT_CHARACTERS:
        left_out = len(prompt) - _PROMPT_CHARACTERS
        prompt = f"[{left_out} characters before this; --whole shows them]\n{prompt[left_out:]}"
    verdict = "error" if sample.error else {1.0: "right", 0.0: "wrong"}.get(sample.score, f"{sample.score:g}")
    facts = [
        (sample.dropped_shots, f"{sample.dropped_shots} examples dropped"),
        (sample.cut_tokens, f"{sample.cut_tokens} tokens cut from the beginning"),
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


def visible(text: str) -> str:
    """Control characters as their codes, line breaks and tabs as they are."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs") else f"\\x{ord(char):02x}"
        for char in text
    )
