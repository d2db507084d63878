"""One table in three forms: text for the terminal, Markdown, and LaTeX (package booktabs)."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from internlm2.config import suggest
from internlm2.eval.task import EvalError


@dataclass(frozen=True)
class Table:
    """Cells as text. notes: sentences below it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def render(table: Table, form: str) -> str:
    """The table as "text", "markdown" or "latex". Raises EvalError for another form."""
    if form not in FORMS:
        raise EvalError(f"There is no table form {form!r}. {suggest(form, list(FORMS))}")
    return FORMS[form](table)


def as_text(table: Table) -> str:
    """Columns as wide as they must be; Chinese characters count twice, as terminals show them."""
    lines = [[visible(cell, keep="") for cell in line] for line in (table.head, *table.rows)]
    widths = [max(_width(line[n]) for line in lines) for n in range(len(table.head))]
    padded = (
        "  ".join(
            cell + " " * (width - _width(cell)) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    )
    return "\n".join([*padded, "", *(visible(note, keep="") for note in table.notes)])


def as_markdown(table: Table) -> str:
    """A pipe table, and the notes as a list. Nothing in a cell is read as markup."""
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    told = ["| " + " | ".join(map(_markdown, line)) + " |" for line in (lines[0], *lines[2:])]
    told.insert(1, "| " + " | ".join(lines[1]) + " |")
    return "\n".join([*told, "", *(f"- {_markdown(note)}" for note in table.notes)])


def as_latex(table: Table) -> str:
    """A `tabular` with the rules of booktabs; the notes are comments above it."""
    columns = "l" + "r" * (len(table.head) - 1)
    rows = [" & ".join(map(_latex, line)) + r" \\" for line in (table.head, *table.rows)]
    return "\n".join(
        [
            *(f"% {visible(note, keep='')}" for note in table.notes),
            r"% needs \usepackage{booktabs}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            rows[0],
            r"\midrule",
            *rows[1:],
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


FORMS: Mapping[str, Callable[[Table], str]] = {"text": as_text, "markdown": as_markdown, "latex": as_latex}

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "±": r"$\pm$", "−": r"$-$", "`": r"\textasciigrave{}",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_LATEX.get(char, char) for char in visible(text, keep=""))


def _markdown(text: str) -> str:
    return "".join(f"\\{char}" if char in "\\`*_[]<>|#&~$" else char for char in visible(text, keep=""))


def visible(text: str, *, keep: str = "\n\t") -> str:
    """Control characters as their codes, also those that turn the direction of writing; but for those in `keep`."""
    return "".join(
        char
        if char in keep or not (unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in _TURNS)
        else (f"\\x{ord(char):02x}" if ord(char) < 0x100 else f"\\u{ord(char):04x}")
        for char in text
    )


_TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def _width(text: str) -> int:
    return sum(
        0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )
