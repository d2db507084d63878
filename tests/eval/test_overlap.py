"""What two texts have in common, against LongBench's own functions and the packages that they call."""

import json
import random
import time
from difflib import SequenceMatcher

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import longbench_metrics

from internlm2.errors import MissingDependencyError
from internlm2.eval import extras, overlap

WORDS = [
    "the",
    "a",
    "cat",
    "sat",
    "Mat",
    "on",
    "it.",
    "is",
    "An",
    "7",
    "Paragraph",
    "cat.",
    "...",
    "x.y",
    "(b)",
]
texts = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
chinese = st.lists(
    st.sampled_from(["今天", "天气", "很好", "，", "。", "上海", "人工智能", " ", "abc"]), max_size=10
).map("".join)


@pytest.fixture(scope="module")
def official():
    with pytest.MonkeyPatch.context() as patch:
        yield longbench_metrics(patch)


@given(answer=texts, gold=texts)
@settings(max_examples=150, deadline=None)
def test_english_scores_are_those_of_longbench(official, answer, gold):
    assert overlap.qa_f1(answer, gold) == pytest.approx(official.qa_f1_score(answer, gold))
    assert overlap.rouge_l(answer, gold) == pytest.approx(official.rouge_score(answer, gold))
    assert overlap.number_share(answer, "7") == pytest.approx(official.count_score(answer, "7"))


@given(answer=chinese, gold=chinese)
@settings(max_examples=60, deadline=None)
def test_chinese_scores_are_those_of_longbench(official, answer, gold):
    assert overlap.qa_f1(answer, gold, is_chinese=True) == pytest.approx(
        official.qa_f1_zh_score(answer, gold)
    )
    assert overlap.rouge_l(answer, gold, is_chinese=True) == pytest.approx(
        official.rouge_zh_score(answer, gold)
    )


def test_rouge_of_longer_texts_is_that_of_the_package():
    from rouge import Rouge

    draw = random.Random(1)
    for _ in range(20):
        answer, gold = (" ".join(draw.choices(WORDS, k=120)) for _ in range(2))
        expected = Rouge().get_scores([answer], [gold])[0]["rouge-l"]["f"]
        assert overlap.rouge_l(answer, gold) == pytest.approx(expected)


def test_texts_on_which_the_package_recurses_too_deep_have_a_score():
    text = "word " * 1500
    assert overlap.rouge_l(text, text) == pytest.approx(1.0, abs=1e-6)


@given(
    classes=st.lists(
        st.sampled_from(["City", "City state", "state", "Food", "Other city", "ity"]), unique=True, max_size=6
    ),
    words=st.lists(st.sampled_from(["City", "state", "Food", "Other"]), max_size=5),
)
@settings(max_examples=200, deadline=None)
def test_classes_are_shared_as_longbench_does(official, classes, words):
    answer = " ".join(words)
    for gold in classes:
        assert overlap.class_share(answer, gold, classes) == official.classification_score(
            answer, gold, all_classes=classes
        )


def test_code_is_compared_by_its_first_line(official):
    gold = "    return self.value + 1"
    for answer in (
        "\n\n    return self.value + 2\nmore",
        "```python\n# a note\n    return value\n",
        "# nothing",
        "x",
    ):
        expected = official.code_sim_score(answer, gold)
        assert overlap.code_similarity(answer, gold) == expected
    assert overlap.code_similarity("", gold) == overlap.code_similarity("```", gold) == 0.0
    # difflib, which fuzzywuzzy falls back to, agrees where the texts differ in one place
    line = "    return self.value + 2"
    assert overlap.code_similarity(line, gold) == round(100 * SequenceMatcher(None, line, gold).ratio()) / 100


def test_rouge_is_that_of_googles_package():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    draw = random.Random(2)
    words = [*WORDS, "naïve", "上海", "don't", "A1-b2", ""]
    for _ in range(200):
        answer, gold = (" ".join(draw.choices(words, k=draw.randint(0, 30))) for _ in range(2))
        expected = scorer.score(gold, answer)
        assert overlap.rouge_1(answer, gold) == pytest.approx(expected["rouge1"].fmeasure)
        assert overlap.rouge_l_of_whole(answer, gold) == pytest.approx(expected["rougeL"].fmeasure)


def test_edit_similarity_leaves_blanks_out():
    assert overlap.edit_similarity(" a\nb c ", "abc") == 1.0
    assert overlap.edit_similarity("", "abc") == 0.0
    assert overlap.edit_similarity("axc", "abc") == pytest.approx(2 / 3)
    assert overlap.edit_similarity("", " ") == 1.0


def test_a_megabyte_is_scored_in_bounded_time():
    start = time.monotonic()
    for text in ("a " * 500_000, "." * 1_000_000, "\0" * 1_000_000, "段落7" * 300_000, "7 " * 500_000):
        overlap.qa_f1(text, "a b")
        overlap.rouge_l(text, "a b. c")
        overlap.number_share(text, "7")
        overlap.edit_similarity(text, "abc")
        overlap.code_similarity(text, "abc")
        overlap.class_share(text, "a", ["a", "b"])
        overlap.rouge_1(text, "a b")
        overlap.rouge_l_of_whole(text, "a b")
    overlap.qa_f1("今天天气" * 250_000, "今天", is_chinese=True)
    assert time.monotonic() - start < 60


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rapidfuzz.fuzz", None)
    with pytest.raises(
        MissingDependencyError, match=r"Comparing code needs rapidfuzz.fuzz, .* 'internlm2\[eval\]'"
    ):
        overlap.code_similarity("a", "b")
    assert extras.library("json", "x") is json


def test_jieba_reads_no_file_that_others_may_write(monkeypatch, tmp_path):
    import marshal

    overlap._jieba.cache_clear()
    monkeypatch.setattr(marshal, "load", lambda file: pytest.fail("a marshal file was read"))
    assert overlap.chinese_words("上海人工智能实验室") == ["上海", "人工智能", "实验室"]
