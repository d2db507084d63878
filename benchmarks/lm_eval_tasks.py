"""lm-evaluation-harness' own MMLU and GSM8K over the data folder, because its data sets cannot be fetched offline.

Each task includes the harness's YAML and changes where the rows come from, nothing else.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

from internlm2.eval.data.folder import DataFolder
from internlm2.eval.tasks.knowledge import LETTERS

TASKS = Path(lm_eval.__file__).parent / "tasks"
GSM8K = "local_gsm8k"


def mmlu_name(subject: str) -> str:
    """The task of a subject."""
    return f"local_mmlu_{subject}"


def write_tasks(
    folder: Path, data: DataFolder, *, mmlu: Mapping[str, Sequence[int]], gsm8k: Sequence[int]
) -> TaskManager:
    """Tasks over the rows of those indices: by subject, and of GSM8K's test split."""
    for subject, indices in mmlu.items():
        rows = _mmlu_rows(data, f"mmlu/test/{subject}_test.csv")
        files = {
            "test": _write(folder / f"{subject}_test.jsonl", [rows[index] for index in indices]),
            "dev": _write(
                folder / f"{subject}_dev.jsonl", _mmlu_rows(data, f"mmlu/dev/{subject}_dev.csv")[:5]
            ),
        }
        _task(
            folder,
            mmlu_name(subject),
            TASKS / "mmlu" / "default" / f"mmlu_{subject}.yaml",
            files,
            "num_fewshot: 5",
        )
    rows = data.rows("gsm8k/test.jsonl", ("question", "answer"))
    files = {
        "test": _write(folder / "gsm8k_test.jsonl", [rows[index] for index in gsm8k]),
        "train": _write(folder / "gsm8k_train.jsonl", data.rows("gsm8k/train.jsonl", ("question", "answer"))),
    }
    _task(folder, GSM8K, TASKS / "gsm8k" / "gsm8k.yaml", files, "")
    return TaskManager(include_path=str(folder), include_defaults=False)


def _mmlu_rows(data: DataFolder, name: str) -> list[dict[str, object]]:
    return [
        {"question": question, "choices": choices, "answer": LETTERS.index(letter)}
        for question, *choices, letter in data.table(name, 6)
    ]


def _write(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _task(folder: Path, name: str, source: Path, files: Mapping[str, Path], more: str) -> None:
    texts = {split: str(path) for split, path in files.items()}
    (folder / f"{name}.yaml").write_text(
        f"include: {source}\n"
        f"task: {name}\n"
        "dataset_path: json\n"
        "dataset_name: null\n"
        f"dataset_kwargs: {json.dumps({'data_files': texts, 'cache_dir': str(folder / 'cache')})}\n"
        f"{more}\n"
    )
