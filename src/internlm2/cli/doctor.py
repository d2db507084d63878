"""`internlm2 doctor`: what is wrong with this installation and with a model folder, and what mends it."""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def doctor(
    path: Annotated[Path | None, Parameter(help="A model folder to examine as well.")] = None,
    *,
    json_output: Annotated[bool, Parameter("--json", help="Print one JSON object.", negative=())] = False,
) -> int:
    """Examine package versions, and a folder's files, ids, stop tokens and template. Exit code 1: something is wrong."""
    from internlm2.doctor.examine import examine
    from internlm2.doctor.finding import as_text

    findings = examine(path)
    if json_output:
        print(json.dumps([finding.as_json() for finding in findings], indent=2, ensure_ascii=False))
    else:
        print(as_text(findings))
    return int(any(finding.level == "wrong" for finding in findings))
