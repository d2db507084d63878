"""`internlm2 eval`: prompt, data."""

import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

DataArgument = Annotated[Path, Parameter(help="Folder in the layout of OpenCompass' data/.")]
DEFAULT_DATA = Path("data")
INCOMPLETE = 1


def prompt(
    item: Annotated[
        str, Parameter(help="TASK:INDEX or TASK.SUBSET:INDEX, such as gsm8k:0 or mmlu.anatomy:3.")
    ],
    *,
    profile: Annotated[str, Parameter(help="card-2024-01, card-2024-02 or fixed.")] = "card-2024-01",
    data: DataArgument = DEFAULT_DATA,
    chat: Annotated[bool, Parameter(help="As a chat model is asked, not a base model.", negative=())] = False,
    label: Annotated[
        str | None, Parameter(help="Put this answer behind it, where answers are compared.")
    ] = None,
) -> None:
    """Print the exact prompt of one item, and nothing else: no line break is added at its end."""
    from internlm2.eval.data.folder import DataFolder
    from internlm2.eval.profile import find_profile
    from internlm2.eval.tasks import find_item

    text = find_item(item, find_profile(profile), DataFolder(data), is_chat=chat).text(label)
    if isinstance(sys.stdout, io.TextIOWrapper):  # bytes, because some prompts hold carriage returns
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode())
    else:
        sys.stdout.write(text)


def data(
    *,
    data: DataArgument = DEFAULT_DATA,
    source: Annotated[
        Path | None,
        Parameter(
            "--from", help="Import from here first: an OpenCompass data/ folder, its code, or parquet files."
        ),
    ] = None,
    copy: Annotated[bool, Parameter(help="Copy files instead of linking to them.", negative=())] = False,
    show_all: Annotated[
        bool, Parameter("--all", help="List every file with its sha256.", negative=())
    ] = False,
    json_output: Annotated[bool, Parameter("--json", help="Print one JSON object.", negative=())] = False,
) -> int:
    """Say which benchmark files are needed, where they go, their licence and sha256, and what is missing.

    Exit code 1 while a file of the model card's benchmarks is missing.
    """
    from internlm2.eval.data.importing import import_folder
    from internlm2.eval.data.status import as_text, examine

    if source is not None:
        done = import_folder(source, data, copy=copy)
        print(f"{len(done.added)} files imported, {len(done.skipped)} were there already.", file=sys.stderr)
    found = examine(data)
    if json_output:
        print(json.dumps({"folder": str(data), "benchmarks": [asdict(one) for one in found]}, indent=2))
    else:
        print(as_text(data, found, show_all=show_all))
    return INCOMPLETE if any(one.missing for one in found if one.name not in ("ceval", "cmmlu")) else 0
