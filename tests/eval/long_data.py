"""Small data folders in the layout of the long-context benchmarks, with text that is made here."""

import base64
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from internlm2.eval.data.folder import DataFolder
from internlm2.eval.data.published import published_files

ROOT = Path(__file__).parents[2]
ESSAYS = sorted(file.name for file in published_files() if file.benchmark == "needle_en")
REAL_TOKENIZER = ROOT / "tests" / "data" / "tokenizer" / "tokenizer.model"
WORDS = [
    "基金",
    "债券",
    "公司",
    "今天",
    "市场",
    "股票",
    "上涨",
    "下跌",
    "北京",
    "投资者",
    "认为",
    "报告",
    "年度",
    "分红",
    "growth",
    "fund",
    "2023",
    "7.5%",
    "，",
]


def write(path: Path, content: str | bytes) -> None:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write JSON lines."""
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def articles(count: int, num_words: int, seed: int = 0) -> list[str]:
    """Texts of different lengths, in which no needle occurs."""
    draw = random.Random(seed)
    return ["".join(draw.choices(WORDS, k=draw.randint(1, 2 * num_words))) + f"。{n}\n" for n in range(count)]


def haystack_folder(path: Path, *, count: int = 120, num_words: int = 60) -> DataFolder:
    """Haystacks of all needle tests, the vocabulary of single bytes as that of GPT-4, and the real tokenizer."""
    rows = [{"text": text} for text in articles(count, num_words)]
    for name in (
        "CDME/zh_finance.jsonl",
        "needlebench/zh_finance.jsonl",
        "needlebench/PaulGrahamEssays.jsonl",
    ):
        write_rows(path / name, rows)
    vocabulary = "".join(f"{base64.b64encode(bytes([n])).decode()} {n}\n" for n in range(256))
    write(path / "needle" / "cl100k_base.tiktoken", vocabulary)
    write(path / "needle" / "tokenizer.model", REAL_TOKENIZER.read_bytes())
    for n, name in enumerate(ESSAYS):
        sentences = (f"Essay {n} says that thing number {k} matters a lot. " for k in range(3))
        write(path / name, "".join(sentences))
    needles = [
        {
            "language": language,
            "needle": f"The treasure of {n} is gold{n}.",
            "retrieval_question": f"What is the treasure of {n}? Please answer in the format 'It is ____.'",
            "arg2": f"gold{n}",
        }
        for language in ("English", "Chinese")
        for n in range(20)
    ]
    write_rows(path / "needlebench" / "needles.jsonl", needles)
    return DataFolder(path)
