"""Tables as text, Markdown and LaTeX, whatever their cells hold."""

import re

import pytest
from markdown_it import MarkdownIt

from internlm2.eval.report.forms import Table, render, visible
from internlm2.eval.task import EvalError

HOSTILE = (
    "a|b \\input{/etc/passwd} $x$ & 5% #1 _u_ ^ ~ <script> `c` [l](javascript:x) *b*\n\x1b[2J\u202e\r\n\\\\"
)
TABLE = Table(
    ("benchmark", "模型", HOSTILE), [("GSM8K", "70.7 ± 1.2", ""), (HOSTILE, "", "1")], ["note", HOSTILE]
)


def test_text_columns_stand_below_each_other_also_in_chinese():
    lines = render(
        Table(("a", "模型名", "b"), [("1", "70.7 ± 1.2", "x"), ("22", "中", "y")]), "text"
    ).splitlines()
    assert lines[:3] == ["a   模型名      b", "1   70.7 ± 1.2  x", "22  中          y"]


def test_no_form_lets_control_characters_or_line_breaks_through():
    for form, num_lines in (("text", 6), ("markdown", 7), ("latex", 11)):
        text = render(TABLE, form)
        assert not set(text) & set("\x1b\r\u202e"), form
        assert len(text.split("\n")) == num_lines, form


def test_markdown_shows_every_cell_as_it_is():
    """The oracle is a Markdown parser."""
    tokens = MarkdownIt("commonmark").enable("table").parse(render(TABLE, "markdown"))
    cells = [token.children or [] for token in tokens if token.type == "inline"]
    shown = ["".join(child.content for child in children) for children in cells]
    assert {child.type for children in cells for child in children} <= {"text", "text_special"}
    plain = visible(HOSTILE, keep="")
    assert shown == ["benchmark", "模型", plain, "GSM8K", "70.7 ± 1.2", "", plain, "", "1", "note", plain]


# What LaTeX makes of the commands that the table may use.
COMMANDS = {
    r"\textbackslash{}": "\\", r"\{": "{", r"\}": "}", r"\$": "$", r"\&": "&", r"\#": "#", r"\_": "_", r"\%": "%",
    r"\textasciicircum{}": "^", r"\textasciitilde{}": "~", r"\textless{}": "<", r"\textgreater{}": ">",
    r"\textbar{}": "|", r"\textquotedbl{}": '"', r"$\pm$": "±", r"\textasciigrave{}": "`",
}  # fmt: skip
COMMAND = re.compile("|".join(map(re.escape, COMMANDS)))


def read_latex(cell: str) -> str:
    rest = COMMAND.sub("", cell)
    assert not set(rest) & set("\\{}$&#_%^~<>|`"), rest
    return COMMAND.sub(lambda found: COMMANDS[found[0]], cell)


def test_latex_has_the_rules_of_booktabs_and_no_active_sign_of_a_cell():
    lines = render(TABLE, "latex").splitlines()
    assert all(line.startswith("% ") for line in lines[:3])
    assert lines[2:] == [
        r"% needs \usepackage{booktabs}", r"\begin{tabular}{lrr}", r"\toprule", lines[5], r"\midrule", *lines[7:9],
        r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip
    for line, row in zip((lines[5], *lines[7:9]), (TABLE.head, *TABLE.rows), strict=True):
        assert line.endswith(r" \\")
        cells = re.split(r" (?<!\\)& ", line.removesuffix(r" \\"))
        assert [read_latex(cell) for cell in cells] == [visible(cell, keep="") for cell in row]


def test_another_form_is_named():
    with pytest.raises(EvalError, match=r"There is no table form 'latx'\. Did you mean 'latex'"):
        render(TABLE, "latx")
