"""One HTML file to browse runs with: the table, what was run, and every answer with filters. It loads nothing.

Everything that a model, a file or a user wrote is escaped; the browser is told to run no script but the page's own.
"""

import hashlib
from base64 import b64encode
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files

from internlm2.eval.report.forms import Table, visible
from internlm2.eval.report.page_data import MAX_BYTES, Packed, pack
from internlm2.eval.results import Results, Row, TaskResult
from internlm2.eval.table import FinishedRun, card_table, headings
from internlm2.eval.task import EvalError

NOTES_OPEN = 5  # more are folded
VERDICTS = (
    ("", "all verdicts"),
    ("right", "right"),
    ("partly", "partly right"),
    ("wrong", "wrong"),
    ("error", "no verdict (error)"),
    ("shortened", "prompt shortened"),
    ("cut", "answer too long"),
    ("differ", "runs differ"),
)


def page(runs: Sequence[FinishedRun], *, max_bytes: int = MAX_BYTES) -> str:
    """The page of one or more runs. max_bytes: of the answers in it.

    Raises EvalError where two runs cannot be told apart.
    """
    names = headings(runs)
    if len(set(names)) < len(names):
        raise EvalError("The same run is given twice, or two folders have one name. Give each once.")
    packed = pack({name: run.samples for name, run in zip(names, runs, strict=True)}, max_bytes=max_bytes)
    room = files("internlm2.eval.report")
    style, script = (room.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    own = f"style-src {_hash(style)}; script-src {_hash(script)}"
    policy = f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"
    title = f"Evaluation of {', '.join(names)}"
    body = "\n".join(_body(runs, names, packed))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{_text(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<h1>{_text(title)}</h1>\n{body}\n"
        f'<script type="application/json" id="data">{packed.json}</script>\n<script>{script}</script>\n'
        "</body>\n</html>\n"
    )


def _hash(content: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _text(value: object) -> str:
    return escape(visible(str(value), keep=""))


def _body(runs: Sequence[FinishedRun], names: Sequence[str], packed: Packed) -> Iterator[str]:
    table = card_table(runs)
    yield "<h2>Scores</h2>"
    yield '<p class="soft">Percent ± standard error.</p>'
    yield _table(table)
    notes = "".join(f"<li>{_text(note)}</li>" for note in table.notes)
    is_open = " open" if len(table.notes) <= NOTES_OPEN else ""
    told = f"<summary>{len(table.notes)} notes on these scores</summary><ul>{notes}</ul>"
    yield f'<details class="soft"{is_open}>{told}</details>'
    yield "<h2>What was run</h2>"
    for run, name in zip(runs, names, strict=True):
        yield f"<details><summary>{_text(name)}</summary>{_facts(run.results)}</details>"
    for task in dict.fromkeys(task for run in runs for task in run.results.tasks):
        results = [run.results.tasks.get(task) for run in runs]
        if any(result is not None and len(result.subsets) > 1 for result in results):
            told = _table(Table(("subset", *names), list(_subset_rows(results))))
            yield f"<details><summary>{_text(task)}: all subsets</summary>{told}</details>"
    yield "<h2>Answers</h2>"
    yield from _warnings(packed)
    yield _filters()


def _warnings(packed: Packed) -> Iterator[str]:
    if packed.num_shortened:
        yield (
            f'<p class="warning">{packed.num_shortened:,} texts of more than {packed.text_limit:,} characters are '
            "shortened in the middle, each marked where. The samples.jsonl of the run holds them whole.</p>"
        )
    if packed.num_left_out:
        yield (
            f'<p class="warning">{packed.num_left_out:,} answers are left out to keep the page small, the last ones. '
            "The samples.jsonl of the run holds them; <code>internlm2 eval show</code> prints them.</p>"
        )
    told = "The answers are shown by a script of this page. Allow it to see them."
    yield f'<noscript><p class="warning">{told}</p></noscript>'


def _filters() -> str:
    verdicts = "".join(f'<option value="{value}">{text}</option>' for value, text in VERDICTS)
    selects = "".join(
        f'<label>{name}<select id="{name}">{verdicts if name == "verdict" else ""}</select></label>'
        for name in ("run", "task", "subset", "verdict")
    )
    return (
        f'<div class="filters">{selects}<label class="wide">text in question or answer'
        '<input type="search" id="search" autocomplete="off" spellcheck="false"></label></div>\n'
        '<div class="bar"><output id="count" aria-live="polite"></output>'
        '<button type="button" id="open">Open all shown</button>'
        '<button type="button" id="close">Close all</button></div>\n'
        '<div id="samples"></div>\n<div class="bar"><button type="button" id="more" hidden>Show more</button></div>'
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table.head)
    rows = "".join(
        f'<tr><th scope="row">{_text(line[0])}</th>'
        + "".join(f"<td>{_text(cell)}</td>" for cell in line[1:])
        + "</tr>"
        for line in table.rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _subset_rows(results: Sequence[TaskResult | None]) -> Iterator[list[str]]:
    rows = dict.fromkeys(name for result in results if result for name in (*result.rows, *result.subsets))
    for name in rows:
        found = [
            (result.rows.get(name) or result.subsets.get(name)) if result else None for result in results
        ]
        yield [name, *map(_cell, found)]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    error = "" if row.standard_error is None else f" ± {row.standard_error:.1f}"
    return f"{row.percent:.1f}{error} (n={row.n:,})"


def _facts(results: Results) -> str:
    """Settings, model and versions, then what belongs to each task."""
    facts: list[tuple[str, object]] = [
        *((f"model {name}", value) for name, value in results.model.items()),
        ("profile", results.profile),
        ("mode", "chat" if results.is_chat else "base"),
        ("questions", results.which if results.limit is None else f"at most {results.which}"),
        ("seed", results.seed),
        ("answers ended early", "yes" if results.early_stop else "no"),
        *((f"version of {name}", value) for name, value in results.versions.items()),
    ]
    for task in results.tasks.values():
        facts += [
            (f"{task.name}: questions", f"{task.num_questions:,}, without a verdict {task.num_errors:,}"),
            (f"{task.name}: tokens", f"{task.prompt_tokens:,} of prompts, {task.output_tokens:,} of answers"),
            (f"{task.name}: seconds", f"{task.seconds:,.1f}"),
            (f"{task.name}: answers that reached their longest length", f"{task.num_cut_answers:,}"),
            (f"{task.name}: prompts that lost examples", _shortened(task.num_dropped_shots)),
            (f"{task.name}: prompts that lost a part", _shortened(task.num_cut_prompts)),
            (f"{task.name}: sha256 of the prompts", task.prompt_sha256),
        ]  # fmt: skip
        facts += [(f"{task.name}: sha256 of {name}", value) for name, value in task.data_sha256.items()]
    rows = "".join(
        f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>' for name, value in facts
    )
    return f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'


def _shortened(count: int) -> str:
    return f"{count:,}; the verdict “prompt shortened” below shows which" if count else "0"
