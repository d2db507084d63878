"""`internlm2 doctor`: what is wrong with this installation and with a model folder, and what mends it."""

import json
from typing import Annotated

from cyclopts import Parameter


def doctor(
    model: Annotated[str | None, Parameter(help="A model to examine as well: folder, id, or `demo`.")] = None,
    *,
    package_only: Annotated[
        bool, Parameter(help="Leave out how transformers fares without internlm2.hf.", negative=())
    ] = False,
    json_output: Annotated[bool, Parameter("--json", help="Print one JSON object.", negative=())] = False,
) -> int:
    """Examine packages, and a folder's files, ids, stop tokens and template. Exit code 1: something is wrong."""
    from internlm2.checkpoint.resolve import resolve_model
    from internlm2.doctor.examine import examine
    from internlm2.doctor.finding import as_text

    path = None if model is None else resolve_model(model)
    findings = examine(path, plain=not package_only)
    if json_output:
        print(json.dumps([finding.as_json() for finding in findings], indent=2, ensure_ascii=False))
    else:
        print(as_text(findings))
    return int(any(finding.level == "wrong" for finding in findings))
