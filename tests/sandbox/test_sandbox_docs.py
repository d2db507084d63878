"""The examples of docs/sandbox.md run and print what they say."""

import contextlib
import io
import re
from pathlib import Path

from internlm2.sandbox import examine_isolation

PAGE = Path(__file__).parents[2] / "docs" / "sandbox.md"


def test_every_example_runs_and_prints_its_comment() -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(example, str(PAGE), "exec"), {})
        told = re.search(r"  # (\w+)$", example, re.MULTILINE)
        assert told is None or printed.getvalue().strip() == told[1]


def test_the_statement_in_the_page_is_the_one_that_is_made() -> None:
    seen = examine_isolation()
    if seen.is_complete:
        assert "\n".join(seen.describe()) in PAGE.read_text(encoding="utf-8")
