"""The table of bad input in docs/serving.md is what the server answers. INTERNLM2_WRITE_DOCS=1 writes it anew."""

import os
import re
from pathlib import Path

import httpx2
from test_serve_bad_input import TABLE

from internlm2.files import write_text

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
PLACE = re.compile(r"(<!-- bad input: .*? -->\n)(.*?)(<!-- end of bad input -->)", flags=re.S)


def test_the_table_of_bad_input_is_true(tools):
    rows = ["| input | path | status | message |", "| --- | --- | --- | --- |"]
    for name, (path, body, _, _) in TABLE.items():
        got = httpx2.post(
            tools.url + path, content=body, headers={"content-type": "application/json"}, timeout=30
        )
        message = got.json()["error"]["message"]
        shown = message if len(message) <= 160 else message[:157] + "..."
        shown = shown.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
        rows.append(f"| {name} | `{path}` | {got.status_code} | {shown} |")
    table = "\n".join(rows) + "\n"
    text = PAGE.read_text(encoding="utf-8")
    if os.environ.get("INTERNLM2_WRITE_DOCS"):
        write_text(PAGE, PLACE.sub(lambda found: found[1] + table + found[3], text))
    found = PLACE.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None
    assert found[2] == table, "docs/serving.md is old: run this test with INTERNLM2_WRITE_DOCS=1"
