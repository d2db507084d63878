"""Parquet files as Hugging Face stores them become files of the layout, row for row."""

from pathlib import Path

import pytest

from internlm2.eval.data.folder import DataError, DataFolder
from internlm2.eval.data.importing import import_folder
from internlm2.eval.profile import PROFILES
from internlm2.eval.tasks import find_item

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
PROFILE = PROFILES["card-2024-01"]


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def hub(sample: DataFolder, folder: Path) -> None:
    """The samples as the hub has them."""
    for split in ("test", "dev"):
        rows = sample.table(f"mmlu/{split}/abstract_algebra_{split}.csv", 6)
        write(
            folder / f"mmlu/all/{split}-00000-of-00001.parquet",
            [{"question": r[0], "subject": "abstract_algebra", "choices": r[1:5], "answer": "ABCD".index(r[5])} for r in rows],
        )  # fmt: skip
    write(folder / "gsm8k/main/test-00000-of-00001.parquet", sample.rows("gsm8k/test.jsonl", ()))
    write(folder / "humaneval/test-00000.parquet", sample.rows("humaneval/human-eval-v2-20210705.jsonl", ()))
    mbpp = sample.rows("mbpp/sanitized-mbpp.jsonl", ())
    parts = {"prompt": mbpp[:7], "test": mbpp[7:9], "validation": mbpp[9:10], "train": mbpp[10:]}
    for split, rows in parts.items():
        write(folder / f"mbpp/sanitized/{split}-00000-of-00001.parquet", rows)
    write(folder / "math/algebra/test-00000-of-00001.parquet", list(sample.json("math/math.json").values()))
    bbh = sample.json("BBH/data/date_understanding.json")
    write(folder / "bbh/date_understanding/test-00000-of-00001.parquet", bbh["examples"])
    law = {
        "id": 0,
        "question": "题",
        "A": "甲",
        "B": "乙",
        "C": "丙",
        "D": "丁",
        "answer": "B",
        "explanation": "",
    }
    arts = {"Question": "问", "A": "甲", "B": "乙", "C": "丙", "D": "丁", "Answer": "B"}
    for split, other in (("val", "test"), ("dev", "dev")):
        write(folder / f"ceval/law/{split}-00000-of-00001.parquet", [law] * 5)
        write(folder / f"cmmlu/arts/{other}-00000-of-00001.parquet", [arts] * 5)
    write(folder / "something/else/test.parquet", [{"text": "left alone"}])


KEYS = [
    "mmlu.abstract_algebra:2",
    "gsm8k:2",
    "humaneval:3",
    "sanitized_mbpp:11",
    "math:4",
    "bbh.date_understanding:1",
]


def test_prompts_from_parquet_are_those_from_the_pack(tmp_path, sample):
    hub(sample, tmp_path / "hub")
    done = import_folder(tmp_path / "hub", tmp_path / "data")
    assert len(done.added) == 7 + 4
    for name in ("shots", "BBH/lib_prompt"):
        (tmp_path / "data" / name).symlink_to(sample.path / name)
    folder = DataFolder(tmp_path / "data")
    for key in KEYS:
        for chat in (False, True):
            found = find_item(key, PROFILE, folder, is_chat=chat)
            assert found == find_item(key, PROFILE, sample, is_chat=chat)
    assert find_item("ceval.law:1", PROFILE, folder, is_chat=False).gold == "B"
    assert find_item("cmmlu.arts:1", PROFILE, folder, is_chat=False).gold == "B"
    names = ("gsm8k/test.jsonl", "mbpp/sanitized-mbpp.jsonl", "mmlu/test/abstract_algebra_test.csv")
    for name in names:
        assert folder.bytes(name) == sample.bytes(name)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("mbpp/test.parquet", [{"source_file": "", "task_id": 1, "prompt": "", "code": "", "test_imports": [""], "test_list": [""]}], "MBPP needs all splits of `sanitized`, but prompt, train, validation"),
        ("law/test.parquet", [{"question": "q", "choices": ["a"], "answer": 0, "subject": "law"}], "instead of four"),
        ("law/test.parquet", [{"question": "q", "choices": ["a"] * 4, "answer": "B", "subject": "law"}], "'B' where a number belongs"),
    ],
)  # fmt: skip
def test_parquet_files_that_do_not_fit_are_refused(name, rows, message, tmp_path):
    write(tmp_path / name, rows)
    with pytest.raises(DataError, match=message):
        import_folder(tmp_path, tmp_path / "data")


def test_damaged_parquet_is_named(tmp_path):
    (tmp_path / "test.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"test.parquet is damaged: .* Download it again"):
        import_folder(tmp_path, tmp_path / "data")
