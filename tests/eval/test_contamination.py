"""The contamination check, against the plain definition of the loss and the table of the report."""

import json
import math
import random
import statistics
from pathlib import Path

import pytest
import torch

import internlm2
from internlm2.cli.main import run as command
from internlm2.engine.llm import LLM
from internlm2.eval import contamination
from internlm2.eval.contamination import PUBLISHED, as_text, check_contamination, read_texts, text_losses
from internlm2.eval.data.folder import DataError
from internlm2.eval.task import EvalError


def write_rows(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Three files: two in GSM8K's form, the reference as plain text."""
    folder = tmp_path_factory.mktemp("rows")
    draw = random.Random(4)
    pairs = [
        {"question": f"What is {draw.randrange(99)} plus {draw.randrange(999)}?", "answer": f"#### {draw.randrange(9)}"}
        for _ in range(12)
    ]  # fmt: skip
    return {
        "test": write_rows(folder / "test.jsonl", pairs[:5]),
        "train": write_rows(folder / "train.jsonl", pairs[5:]),
        "reference": write_rows(
            folder / "mock.jsonl", [{"text": "Wie viel?\u2028 Drei."}, {"text": "你好 1"}]
        ),
    }


@pytest.fixture(scope="module")
def llm(chat_folder) -> LLM:
    torch.set_num_threads(1)
    return LLM(chat_folder, dtype="float32", max_model_len=256)


@torch.inference_mode()
def losses_of_opencompass(folder: Path, texts: list[str]) -> list[float]:
    """Summed over tokens 2 to n, divided by n, the start id counted."""
    model = internlm2.load_model(folder)
    tokenizer = internlm2.Tokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        ids = tokenizer.encode(text, bos=True)
        logits = model(torch.tensor([ids]))[0, :-1].double()
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
        found.append(float(loss) / len(ids))
    return found


def test_the_losses_are_those_of_the_definition(llm, chat_folder, files):
    sets = {name: read_texts(path) for name, path in files.items()}
    rows = [json.loads(line) for line in files["test"].read_text().splitlines()]
    assert list(sets["test"].texts) == [f"{row['question']} {row['answer']}" for row in rows]
    assert sets["reference"].texts == ("Wie viel?\u2028 Drei.", "你好 1")
    found = check_contamination(llm, name="tiny", **sets)
    expected = {name: losses_of_opencompass(chat_folder, list(one.texts)) for name, one in sets.items()}
    for name, one in (("test", found.test), ("train", found.train), ("reference", found.reference)):
        values = expected[name]
        assert one.loss == pytest.approx(statistics.fmean(values), abs=1e-5)
        assert one.standard_error == pytest.approx(
            statistics.stdev(values) / math.sqrt(len(values)), abs=1e-5
        )
        assert (one.n, one.file) == (len(values), str(files[name]))
        assert len(one.sha256) == 64
    assert found.leak.value == pytest.approx(found.test.loss - found.reference.loss)
    assert found.overfit.value == pytest.approx(found.test.loss - found.train.loss)
    assert found.overfit.standard_error**2 == pytest.approx(
        found.test.standard_error**2 + found.train.standard_error**2
    )


def test_losses_are_in_order_beyond_one_window(llm, files, monkeypatch):
    texts = read_texts(files["train"])
    whole = list(text_losses(llm, texts))
    monkeypatch.setattr(contamination, "_WINDOW", 2)
    assert list(text_losses(llm, texts)) == pytest.approx(whole, abs=1e-5)
    assert len(set(whole)) == len(whole)


def test_the_published_rows_have_the_differences_of_the_report():
    differences = {one.model: (one.test - one.reference, one.test - one.train) for one in PUBLISHED}
    for model, expected in (
        ("InternLM2-7B-Base", (0.09, -0.02)),
        ("InternLM2-7B", (0.02, 0.34)),
        ("InternLM2-20B-Base", (0.08, -0.01)),
        ("InternLM2-20B", (0.04, 0.35)),
    ):
        assert differences[model] == pytest.approx(expected)


def test_the_table_has_all_numbers_and_says_what_they_mean(llm, files):
    sets = {name: read_texts(path) for name, path in files.items()}
    found = check_contamination(llm, name="tiny", **sets)
    lines = as_text(found).splitlines()
    assert lines[0].split() == [
        "model",
        "test",
        "train",
        "reference",
        "test",
        "-",
        "reference",
        "test",
        "-",
        "train",
    ]
    assert lines[1].startswith("tiny ")
    for value in (
        found.test.loss,
        found.train.loss,
        found.reference.loss,
        found.leak.value,
        found.overfit.value,
    ):
        assert f"{value:.3f} ± " in lines[1]
    assert [line.split()[-1] for line in lines[2:6]] == ["-0.02", "0.34", "-0.01", "0.35"]
    assert f"reference: 2 rows of {files['reference']}" in lines
    assert "clearly above 0: the training rows are known" in lines[-1]


def test_without_a_reference_the_leak_is_left_open(llm, files):
    found = check_contamination(
        llm, name="tiny", test=read_texts(files["test"], limit=1), train=read_texts(files["train"])
    )
    assert found.leak is None
    assert (found.test.standard_error, found.overfit.standard_error) == (None, None)
    assert as_text(found).splitlines()[1].split()[-3:-1] == ["-", "-"]


def test_a_limit_draws_with_the_seed(files):
    everything = read_texts(files["train"]).texts
    drawn = [read_texts(files["train"], limit=3, seed=seed).texts for seed in range(8)]
    assert all(len(one) == 3 and [text for text in everything if text in one] == list(one) for one in drawn)
    assert len(set(drawn)) > 1
    assert read_texts(files["train"], limit=3, seed=2).texts == drawn[2]
    assert read_texts(files["train"], limit=99).texts == everything


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is empty. Give a file of JSON lines"),
        ("\n\n", "is empty"),
        ('{"text": "a b"}\n{broken\n', "is damaged at line 2: "),
        ('{"question": "a"}\n', "line 1: the row has neither question and answer nor text"),
        ('{"text": 3}\n', "line 1: the row has neither"),
        ('{"question": "a", "answer": ""}\n', "line 1: the row has neither"),
        ("[1]\n", "line 1: the row has neither"),
        ("[" * 100_000 + "\n", "is damaged at line 1: "),
    ],
)
def test_rows_that_cannot_be_read_are_named(content, told, tmp_path):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError) as caught:
        read_texts(tmp_path / "rows.jsonl")
    assert told in str(caught.value)
    assert str(tmp_path / "rows.jsonl") in str(caught.value)


def test_what_cannot_be_measured_is_named(llm, tmp_path):
    with pytest.raises(DataError, match=r"There is no file .*none\.jsonl"):
        read_texts(tmp_path / "none.jsonl")
    with pytest.raises(EvalError, match="limit is 0, but must be at least 1"):
        read_texts(tmp_path / "none.jsonl", limit=0)
    rows = read_texts(write_rows(tmp_path / "long.jsonl", [{"text": "short"}, {"text": "long " * 99}]))
    with pytest.raises(EvalError, match=r"Text 2 of .*long\.jsonl: The prompt has 496 tokens"):
        list(text_losses(llm, rows))
    llm.frontend.settle()
    assert not llm.frontend.engine.has_work


def test_the_command_prints_the_table_or_json(chat_folder, files, capsys):
    words = [
        "eval",
        "contamination",
        str(chat_folder),
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    for name, path in files.items():
        words += [f"--{name}", str(path)]
    assert command(words) == 0
    table = capsys.readouterr().out
    assert command([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == str(chat_folder)
    assert f"{found['test']['loss']:.3f} ± {found['test']['standard_error']:.3f}" in table
    assert found["test_minus_train"]["value"] == found["test"]["loss"] - found["train"]["loss"]
    assert found["test_minus_reference"]["value"] == found["test"]["loss"] - found["reference"]["loss"]
    assert command([*words, "--json", "--limit", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["n"] == 2
    assert command([*words[:-1], "nowhere.jsonl"]) == 2
    assert "There is no file nowhere.jsonl" in capsys.readouterr().err


@pytest.mark.slow
def test_rows_that_a_model_has_learned_cost_less_than_others(demo, tmp_path):
    """The demo model has learned proverbs, and nobody has learned the same words in another order."""
    known = ["To be, or not to be, that is the question.", "The quick brown fox jumps over the lazy dog.",
             "Mary had a little lamb, its fleece was white as snow.", "I think, therefore I am."]  # fmt: skip
    fresh = ["Be question, that or to the is not to be, to.", "Over quick the dog fox lazy jumps brown the.",
             "Lamb snow a its Mary, fleece little was as white had.", "Am I, think therefore I."]  # fmt: skip
    test = read_texts(write_rows(tmp_path / "known.jsonl", [{"text": text} for text in known]))
    other = read_texts(write_rows(tmp_path / "fresh.jsonl", [{"text": text} for text in fresh]))
    found = check_contamination(
        LLM("demo", dtype="float32"), name="demo", test=test, train=test, reference=other
    )
    assert found.leak.value < -2 * found.leak.standard_error
    assert found.overfit.value == 0
