"""Perplexity: windows against the plain definition, numbers against a forward pass in float64."""

import json
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import internlm2
from internlm2.cli.perplexity import perplexity
from internlm2.engine.llm import LLM
from internlm2.eval.backends.scorer import EngineScorer
from internlm2.eval.task import EvalError
from internlm2.eval.tasks.perplexity import Window, measure, spans


class Uniform:
    """Every token has probability 1/4, and is a character."""

    def __init__(self, *, start: bool = True, max_tokens: int = 100) -> None:
        self.start_ids = (0,) if start else ()
        self.max_tokens = max_tokens
        self.contexts: list[list[int]] = []

    def encode(self, text: str) -> list[int]:
        return [ord(char) for char in text]

    def score(self, contexts, targets):
        assert all(contexts)
        assert all(len(one) + len(two) <= self.max_tokens for one, two in zip(contexts, targets, strict=True))
        self.contexts += contexts
        return [[math.log(0.25)] * len(target) for target in targets]


@given(
    num_tokens=st.integers(1, 60),
    size=st.integers(3, 20),
    stride=st.integers(1, 20),
    num_start=st.integers(0, 1),
)
def test_every_token_is_scored_once_in_the_first_window_that_has_it(num_tokens, size, stride, num_start):
    room = size - num_start
    stride = min(stride, room - (1 - num_start))
    found = list(spans(num_tokens, Window(size, stride), num_start=num_start))
    scored = [n for span in found for n in range(span.first, span.end)]
    assert scored == list(range(1 - num_start, num_tokens))
    for n, span in enumerate(found):
        assert span.end - span.start <= room
        assert span.start <= span.first < span.end
        if n:
            assert span.end - span.first <= stride
            assert span.start == max(0, span.end - room)  # as much before it as the window has room for


def test_chunks_are_windows_without_overlap():
    found = list(spans(10, Window(4), num_start=1))
    assert (found[0].start, found[0].first, found[0].end) == (0, 0, 3)
    assert [span.end - span.first for span in found] == [3, 3, 3, 1]
    sliding = list(spans(10, Window(4, 1), num_start=1))
    assert len(sliding) == 8


def test_numbers_are_per_token_word_and_byte():
    scorer = Uniform()
    found = measure(scorer, [("a", "ab 上海"), ("b", "cd")], Window(5, 2))
    one = found.texts["a"]
    assert (one.num_tokens, one.num_words, one.num_bytes, one.num_unscored) == (5, 2, 9, 0)
    assert one.token_perplexity == pytest.approx(4.0)
    assert one.word_perplexity == pytest.approx(4 ** (5 / 2))
    assert one.byte_perplexity == pytest.approx(4 ** (5 / 9))
    assert one.bits_per_byte == pytest.approx(2 * 5 / 9)
    assert (found.total.num_tokens, found.total.num_bytes) == (7, 11)
    assert found.by_position == {
        1: pytest.approx(math.log(4)),
        2: pytest.approx(math.log(4)),
        4: pytest.approx(math.log(4)),
    }
    assert all(context[0] == 0 for context in scorer.contexts)


def test_without_a_start_token_the_first_token_is_not_scored():
    found = measure(Uniform(start=False), [("a", "abcdef")], Window(3, 1)).texts["a"]
    assert (found.num_tokens, found.num_unscored) == (5, 1)


@pytest.mark.parametrize(
    ("texts", "window", "message"),
    [
        ([("a", "text")], Window(101), "The window is 101 tokens, but the model has room for 100"),
        ([("a", "text")], Window(4, 4), "The stride must be at least 1"),
        ([("a", "text")], Window(4, 0), "The stride must be at least 1"),
        ([("a", "text"), ("a", "text")], Window(4), "There are two texts named 'a'"),
        ([], Window(4), "No text is given"),
        ([("a", "")], Window(4), "a has no token"),
    ],
)
def test_what_cannot_be_measured_is_told(texts, window, message):
    with pytest.raises(EvalError, match=message):
        measure(Uniform(), texts, window)


def test_values_that_are_no_numbers_are_told(monkeypatch):
    scorer = Uniform()
    monkeypatch.setattr(scorer, "score", lambda contexts, targets: [[math.nan] * len(one) for one in targets])
    with pytest.raises(EvalError, match="gave no number for some tokens of a"):
        measure(scorer, [("a", "text")], Window(4))


@torch.inference_mode()
def plain_nats(folder, tokenizer, text: str, window: Window) -> float:
    """By one forward pass for each window, as it is defined."""
    model = internlm2.load_model(folder)
    ids, total, done = tokenizer.encode(text), 0.0, 0
    room = window.size - 1
    end = min(room, len(ids))
    while done < len(ids):
        part = [tokenizer.bos_id, *ids[max(0, end - room) : end]]
        logprobs = model(torch.tensor([part]))[0, :-1].double().log_softmax(-1)
        own = logprobs.gather(1, torch.tensor(part[1:])[:, None])[:, 0]
        total -= float(own[len(own) - (end - done) :].sum())
        done, end = end, min(len(ids), end + (window.stride or room))
    return total


@pytest.mark.parametrize("window", [Window(64), Window(64, 16), Window(512)])
def test_the_engine_gives_what_forward_passes_give(chat_folder, window):
    text = "The quick brown fox jumps over the lazy dog. 上海人工智能实验室。\n" * 3
    llm = LLM(chat_folder, dtype="float32", max_model_len=600)
    found = measure(EngineScorer(llm), [("a", text)], window).total
    assert found.nats == pytest.approx(plain_nats(chat_folder, llm.tokenizer, text, window), rel=1e-5)
    assert found.num_tokens == len(llm.tokenizer.encode(text))


def test_the_command_prints_text_or_json(chat_folder, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("A text. " * 20)
    (tmp_path / "b.jsonl").write_text('{"text": "One."}\n{"text": "Two."}\n')
    files = (tmp_path / "a.txt", tmp_path / "b.jsonl")
    perplexity(str(chat_folder), *files, window=64, stride=32, json_output=True)
    found = json.loads(capsys.readouterr().out)
    assert list(found["texts"]) == [str(files[0]), f"{files[1]}:1", f"{files[1]}:2"]
    assert found["window"] == {"size": 64, "stride": 32}
    assert found["total"]["num_bytes"] == 168
    assert found["total"]["token_perplexity"] == pytest.approx(
        math.exp(found["total"]["nats"] / found["total"]["num_tokens"])
    )
    perplexity(str(chat_folder), *files, window=64)
    page = capsys.readouterr().out
    assert page.startswith("Windows of 64 tokens with chunks. Perplexity:\n")
    assert "bits per byte (" in page
    with pytest.raises(EvalError, match="No text is given"):
        perplexity(str(chat_folder))


@pytest.mark.slow
def test_the_demo_model_reads_english_better_than_noise():
    llm = LLM("demo", dtype="float32", max_model_len=512)
    text = "The sun rises in the east and sets in the west. Water boils at one hundred degrees. " * 4
    scorer = EngineScorer(llm)
    assert scorer.start_ids == ()  # its tokenizer has none
    english = measure(scorer, [("a", text)], Window(256, 128)).total
    assert 1 < english.token_perplexity < 20
    assert (
        measure(scorer, [("a", text[::-1])], Window(256, 128)).total.bits_per_byte > 2 * english.bits_per_byte
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.txt"], r"There is no file .*none\.txt\. Check its name\."),
        (["latin.txt"], r"latin\.txt cannot be read: it is not UTF-8 .*Mend it, or leave it out\."),
        (["bad.jsonl"], r"bad\.jsonl cannot be read: line 1 has no field 'text'\. Mend it"),
        (["good.txt", "--window", "0"], "window is 0, but must be at least 2"),
        (["good.txt", "--stride", "0"], "stride is 0, but must be at least 1"),
    ],
)
def test_what_the_command_cannot_read_is_refused_before_a_model_is_loaded(words, message, tmp_path, capsys):
    from internlm2.cli import main as cli

    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "bad.jsonl").write_text('{"txt": 1}\n')
    assert (
        cli.run(["eval", "perplexity", str(tmp_path / "no-model"), str(tmp_path / words[0]), *words[1:]]) == 2
    )
    told = capsys.readouterr().err
    assert re.search(message, " ".join(told.split()))
    assert "internlm2 eval data" not in told
