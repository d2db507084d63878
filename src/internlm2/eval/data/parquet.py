"""Parquet files of Hugging Face as files of the OpenCompass layout, told apart by their columns.

Which subset and split a file holds is read from its columns and its place: `test-00000-of-00001.parquet` in a folder
named after the subject, as the hub stores them.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from internlm2.errors import MissingDependencyError
from internlm2.eval.data.folder import DataError

Row = dict[str, object]
LETTERS = "ABCD"


def read_parquets(source: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each benchmark file that the parquet files below `source` hold.

    Raises MissingDependencyError without pyarrow, DataError for damaged or incomplete files. Files of other datasets
    are left alone.
    """
    tables: dict[str, dict[tuple[str, str], list[Row]]] = {}
    for path in sorted(source.rglob("*.parquet")):
        rows = _read(path)
        kind = _kind(set(rows[0])) if rows else None
        if kind is not None:
            place = (path.parent.name, re.split(r"[-_.]", path.name)[0])
            tables.setdefault(kind, {}).setdefault(place, []).extend(rows)
    for kind, parts in tables.items():
        yield from _WRITERS[kind](parts)


def _read(path: Path) -> list[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingDependencyError(
            "Reading parquet files needs pyarrow. Install it with `pip install 'internlm2[eval]'`."
        ) from None
    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is damaged: {error}. Download it again.") from error


def _kind(columns: set[str]) -> str | None:
    """Which dataset has these columns."""
    for kind, needed in _COLUMNS.items():
        if needed <= columns:
            return kind
    return None


_COLUMNS: Mapping[str, set[str]] = {
    "mmlu": {"question", "choices", "answer"},
    "humaneval": {"task_id", "prompt", "canonical_solution", "test", "entry_point"},
    "mbpp": {"source_file", "task_id", "prompt", "code", "test_imports", "test_list"},
    "math": {"problem", "level", "type", "solution"},
    "ceval": {"question", *LETTERS, "answer"},
    "cmmlu": {"Question", *LETTERS, "Answer"},
    "gsm8k": {"question", "answer"},
    "bbh": {"input", "target"},
}
_Parts = Mapping[tuple[str, str], Sequence[Row]]


def _lines(rows: Sequence[Mapping[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _table(rows: Sequence[Sequence[object]]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue().encode()


def _mmlu(parts: _Parts) -> Iterator[tuple[str, bytes]]:
    by_subject: dict[tuple[str, str], list[Row]] = {}
    for (folder, split), rows in parts.items():
        for row in rows:
            by_subject.setdefault((str(row.get("subject") or folder), split), []).append(row)
    for (subject, split), rows in by_subject.items():
        if split in ("dev", "test"):
            table = [
                [row["question"], *_list(row["choices"]), LETTERS[_index(row["answer"])]] for row in rows
            ]
            yield f"mmlu/{split}/{subject}_{split}.csv", _table(table)


def _gsm8k(parts: _Parts) -> Iterator[tuple[str, bytes]]:
    for (_, split), rows in parts.items():
        if split in ("train", "test"):
            yield (
                f"gsm8k/{split}.jsonl",
                _lines([{key: row[key] for key in ("question", "answer")} for row in rows]),
            )


def _math(parts: _Parts) -> Iterator[tuple[str, bytes]]:
    rows = [row for (_, split), own in sorted(parts.items()) if split == "test" for row in own]
    keys = ("problem", "level", "type", "solution")
    if rows:
        numbered = {str(n): {key: row[key] for key in keys} for n, row in enumerate(rows)}
        yield "math/math.json", json.dumps(numbered, indent=4).encode()


def _humaneval(parts: _Parts) -> Iterator[tuple[str, bytes]]:
    rows = [row for (_, split), own in parts.items() if split == "test" for row in own]
    if rows:
        yield "humaneval/human-eval-v2-20210705.jsonl", _lines(rows)


def _mbpp(parts: _Parts) -> Iterator[tuple[str, bytes]]:
    """All four splits together: the evaluated rows are counted in the whole file, which is sorted by id."""
    rows = sorted((row for own in parts.values() for row in own), key=lambda row: _index(row["task_id"]))
    missing = {"prompt", "test", "validation", "train"} - {split for _, split in parts}
    if missing:
        raise DataError(
            f"MBPP needs all splits of `sanitized`, but {', '.join(sorted(missing))} is missing beside the others."
        )
    keys = ("source_file", "task_id", "prompt", "code", "test_imports", "test_list")
    yield "mbpp/sanitized-mbpp.jsonl", _lines([{key: row[key] for key in keys} for row in rows])


def _bbh(parts: _Parts) -> Iterator[tuple[str, bytes]]:
    for (task, _), rows in parts.items():
        examples = [{"input": row["input"], "target": row["target"]} for row in rows]
        yield f"BBH/data/{task}.json", json.dumps({"examples": examples}, indent=2).encode()


def _ceval(parts: _Parts) -> Iterator[tuple[str, bytes]]:
    for (subject, split), rows in parts.items():
        columns = ["id", "question", *LETTERS, "answer", "explanation"]
        table = [columns, *([row.get(column, "") for column in columns] for row in rows)]
        yield f"ceval/formal_ceval/{split}/{subject}_{split}.csv", _table(table)


def _cmmlu(parts: _Parts) -> Iterator[tuple[str, bytes]]:
    for (subject, split), rows in parts.items():
        columns = ["Question", *LETTERS, "Answer"]
        table = [["", *columns], *([n, *(row[column] for column in columns)] for n, row in enumerate(rows))]
        yield f"cmmlu/{split}/{subject}.csv", _table(table)


_WRITERS: Mapping[str, Callable[[_Parts], Iterator[tuple[str, bytes]]]] = {
    "mmlu": _mmlu,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
    "math": _math,
    "ceval": _ceval,
    "cmmlu": _cmmlu,
    "gsm8k": _gsm8k,
    "bbh": _bbh,
}


def _list(value: object) -> list[object]:
    if not isinstance(value, list) or len(value) != len(LETTERS):
        raise DataError(f"A question has the choices {str(value)[:80]} instead of four.")
    return value


def _index(value: object) -> int:
    if not isinstance(value, int):
        raise DataError(f"A parquet file has {value!r} where a number belongs.")
    return value
