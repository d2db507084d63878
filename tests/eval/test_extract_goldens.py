"""Extraction against OpenCompass' own outputs, against naive oracles, and against hostile text."""

import json
import time
from pathlib import Path

import naive_extract as naive
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from internlm2.eval.extract import PROTOCOLS, agieval, choice, code, equivalent, latex, mended, number
from internlm2.eval.extract.value import same_values

VECTORS = json.loads(
    (Path(__file__).parents[1] / "data" / "eval" / "golden" / "postprocess.json").read_text(encoding="utf-8")
)


def test_all_vectors_are_there():
    assert len(VECTORS) == 67
    assert {vector["fn"] for vector in VECTORS} == set(PROTOCOLS)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v['fn']}-{str(v['args'])[:30]}")
def test_vector(vector):
    found = PROTOCOLS[vector["fn"]](*vector["args"], **vector["kwargs"])
    assert found == vector["out"]
    assert type(found) is type(vector["out"])


def texts(*pieces: str) -> st.SearchStrategy[str]:
    """Texts of the pieces that the rules look for."""
    return st.lists(st.sampled_from(pieces), max_size=14).map("".join)


CHOICE_TEXTS = texts(
    "答案", "是", "为", "选", "应该", "应", "：", ":", "，", "。", " ", "\n", "A", "B", "E", "1", ".", "$", "说法", "不", "正确", "错误",
    "所以", "因此", "显然", "只有", "项", "对", "the answer is ", "The correct answer is option ", "x", "故", "the answer to the question is ",
)  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(CHOICE_TEXTS)
@example("答案是答案是 A")
@example("xAx\n1x\nxBx")
@example("xAx 答案是答案是 xB")
@example("答案是x。A 答案是B")
@example("11\n\n1\nB\n")
def test_first_option_is_what_plain_searches_find(text):
    assert choice.first_option(text, "ABCDE") == naive.first_option(text, "ABCDE")


MATH_TEXTS = texts(
    "\\text{", "\\textbf{", "\\overline{", "\\boxed{", "{", "}", "$", "1", "2.0", ".00", "a ", " ", "frac", "\\frac", "\\sqrt", "3",
    "final answer is ", "answer is:", "answeis", "oxed{", "100,000", "\\mbox{", "\\text{ cm", "=", "x", "/", "j", "inf", "\\left(", ".", "%",
)  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(MATH_TEXTS)
@example("\\boxed{a}}\\boxed{")
@example("1.0.0x")
def test_math_answers_are_what_plain_substitutions_give(text):
    assert latex._normalise(text) == naive.normalise(text)


@settings(max_examples=600, deadline=None)
@given(MATH_TEXTS, MATH_TEXTS)
@example("\\left 5", "5")
@example("x/2", "x/2 ")
@example("ij", "ii")
def test_equivalence_is_what_plain_substitutions_give(first, second):
    assert equivalent.version_2(first, second) == naive.equivalent_2(first, second)


@settings(max_examples=300, deadline=None)
@given(
    texts("$", "1", "23", ".", "5", "a", "_", " ", "=", "\\n", "\n", "²", "答案是", "The answer is therefore")
)
def test_cloze_answers_are_what_plain_searches_find(text):
    assert agieval.cloze(text) == naive.cloze(text)


QUOTED = texts("'", '"', "'''", '"""', "\\", "\\n", "a", " ", "\n", "\\'", "def f", "DONE")


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@settings(max_examples=300, deadline=None)
@given(QUOTED)
def test_quoted_answers_are_read_as_python_reads_one_literal(text):
    found = code._unquoted(text)
    assert found in (text, naive.literal(text))


def test_an_answer_is_never_run():
    for read in (code.mbpp, code.humaneval_2):
        assert "system" in read("__import__('os').system('exit')")
    assert code.mbpp("x = '\\d' + y\nDONE") == "x = 'd' + y"
    assert code.mbpp("'def f():\\n  return 1'") == "def f():\n  return 1"
    assert code.mbpp("'a' + 'b'") == "a' + 'b"  # what eval would have joined stays as it is


SIZE = 100_000
BAITS = [
    "(" * SIZE, "答案是" * (SIZE // 3) + " x", "1x" * (SIZE // 2) + "\n\nx", "9" * SIZE, "9" * SIZE + "a",
    "\\text{" * (SIZE // 6), "\\boxed{" * (SIZE // 7), "$" * SIZE, "{" * SIZE + "}" * SIZE, "\\frac" * (SIZE // 5),
    "```" * (SIZE // 3), "'" * SIZE, "' " * (SIZE // 2), "\0" * SIZE, " " * SIZE, "\n" * SIZE, "A" * SIZE, ",".join("1" * (SIZE // 2)),
    "answer is " * (SIZE // 10), "\\mbox{" * (SIZE // 6), "1.0" * (SIZE // 3), "'" + "\\" * SIZE + "'", "-" * SIZE, "=" * SIZE,
    "\\sqrt" * (SIZE // 5), "def f():\n" * (SIZE // 9), "answer is $" * (SIZE // 11), "(A" * (SIZE // 2), "选A" * (SIZE // 2) + "B",
    "\\text{a}" * (SIZE // 8), "BEGIN" * (SIZE // 5), "finalansweris" * (SIZE // 13), "oxed{" * (SIZE // 5), "A、" * (SIZE // 2),
]  # fmt: skip
READERS = {
    **{
        name: function
        for name, function in PROTOCOLS.items()
        if name not in ("gsm8k_gold", "first_option_ABCDE")
    },
    "first_option": lambda text: choice.first_option(text, "ABCDE"),
    "mended choice": lambda text: mended.choice(text, "ABCDE"),
    "mended choices": lambda text: mended.choices(text, "ABCD"),
    "mended statement": lambda text: (
        mended.bracketed_letter(mended.statement(text)) + mended.plain_words(text)
    ),
    "mended number": lambda text: str(mended.same_numbers(mended.number(text), "4")),
    "mended formula": lambda text: str(same_values(mended.formula(text), "4") or mended.blanks(text)),
    "mended body": lambda text: mended.function_body(text, "f"),
    "mended program": mended.whole_program,
    "same values": lambda text: same_values(text, text + "1"),
}


@pytest.mark.parametrize("name", READERS)
def test_hostile_answers_are_read_in_bounded_time(name):
    read = READERS[name]
    for bait in BAITS:
        started = time.process_time()
        read(bait, bait + "1") if name.startswith("math_equiv") else read(bait)
        seconds = time.process_time() - started
        assert seconds < 1.0, f"{seconds:.1f} s for {bait[:12]!r}"


@pytest.mark.parametrize(
    ("text", "gold"), [("foo\n#### 1,234", "1234"), ("#### -10", "-10"), ("a #### 3 #### 4", "3 ")]
)
def test_gold_numbers(text, gold):
    assert number.gold(text) == gold


@pytest.mark.parametrize(
    ("first", "second", "original", "ours"),
    [("x/2", "x/2 ", True, False), ("\\frac", "\\frac ", False, True), ("1/2", "\\frac12", True, True)],
)
def test_agieval_compares_by_the_original_rules(first, second, original, ours):
    assert equivalent.hendrycks(first, second) is original
    assert equivalent.version_1(first, second) is ours
    assert equivalent.hendrycks(None, None) is True
    assert equivalent.hendrycks(None, "1") is False


def test_a_gold_without_its_mark_is_refused():
    with pytest.raises(ValueError, match="no '#### '"):
        number.gold("18")


@pytest.mark.parametrize(
    ("answer", "gold", "is_equal"),
    [
        ("18", "18", True),
        ("18.0", "18", True),
        ("18.5", "18", False),
        ("NULL", "18", False),
        ("9" * 400, "1", False),
    ],
)
def test_nearly_equal_numbers(answer, gold, is_equal):
    assert number.nearly_equal(answer, gold) is is_equal
