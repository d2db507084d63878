"""Hostile answers: every reader takes time that grows with the length of an answer and not with its square.

Growth is measured by processor time over three doublings, which a busy machine hardly disturbs; nothing here depends on
how fast the machine is.
"""

import time
from collections.abc import Callable

import pytest
from test_extract_goldens import READERS

from internlm2.eval.extract import PROTOCOLS, equivalent

LONGEST, LONGEST_SLOW = 32_000, 512_000  # characters; a billion steps where each is compared with each
MEASURABLE_SECONDS = 0.02
NUM_DOUBLINGS = 3
MOST_PER_DOUBLING = 3.0  # 2 where time is linear, 4 where it is quadratic
UNITS = [
    "(", ")", "{", "}", "[", "]", "$", "\\", "/", "'", '"', "`", "#", "=", ",", ".", "-", "0", "1", "A", "a", " ", "\n", "\t", "\0", "\r",
    "\ud800", "中", "。", "：", "、", "١", "\u2028", "()", "{}", "$$", "$ $", "$x\n", "$\\$", "\\\\", "\\{", "\\$", "```", "```\n", "```py\n",
    "'a'", "'a' ", "' ", "'\n", "'''", '"""', "'\\", "1.", "1.0", "1,", "1 ", "1x", "a1", "-1", "-$", "$ 1", "1/1", "/2", ".5", " .",
    "A ", "A\n", "A。", "(A", "(A)", "A、", "A,", " A", "是A", "选", "选A", "选择", "只有选项", "说法不正确选项的是", "1.A", "答案", "答案是", "答案是 ", "答案为", "答案应该是",
    "因此", "所以", "所有", "显然", "[是", "answer", "answer is", "answer is ", "the answer is ", "The answer is", "The answer to the question is ", "answer to the question",
    "answer:", "answer :  ", "final answer", "finalansweris", "Question:", "####", "#### ", "def ", "def f", "def f(", "def f():\n", "    x\n", "x\n    ", "  x\n", "async def f",
    "import ", "from ", "\n\n", "\n \n", " \n", "[BEGIN]", "BEGIN", "[DONE]", "DONE", "'[DONE]", "' DONE", "\\boxed", "\\boxed{", "\\boxed{}", "\\fbox{", "oxed{", "oxed{}",
    "\\text", "\\text{", "\\text{ ", "\\text{a}", "\\textbf{", "\\mbox{", "\\mbox{}", "\\overline{", "\\frac", "\\frac{", "\\frac1", "\\dfrac", "frac", "rac", "\\sqrt", "\\sqrt{", "\\sqrt[", "sqrt",
    "\\left", "\\infty", "inf", "x\\in", "\\cup", "\\circ", "^{\\circ}", "and", "j", "ways", ",\\!", "{,}", "option ", "choice", "(option", "**",
]  # fmt: skip
ENDINGS = ("", "x", "\n", "答案是", "1", "}")
ALL_READERS: dict[str, Callable[[str], object]] = {
    **{name: read for name, read in READERS.items() if not name.startswith("math_equiv")},
    "math_equiv_v1": lambda text: equivalent.version_1(text, text + "1"),
    "math_equiv_v2": lambda text: equivalent.version_2(text, text + "1"),
    "hendrycks": lambda text: equivalent.hendrycks(text, text + "1"),
    "gsm8k_gold": lambda text: PROTOCOLS["gsm8k_gold"]("#### " + text),
}


def bait(unit: str, ending: str, size: int) -> str:
    return unit * (size // len(unit)) + ending


def seconds(read: Callable[[str], object], text: str) -> float:
    started = time.process_time()
    read(text)
    return time.process_time() - started


def too_much(read: Callable[[str], object], unit: str, ending: str, longest: int = LONGEST) -> str:
    """What is wrong with the growth of time, or ""."""
    size = 2_000
    while (taken := seconds(read, bait(unit, ending, size))) < MEASURABLE_SECONDS and size < longest:
        size *= 4
    if taken < MEASURABLE_SECONDS:
        return ""
    small = size >> NUM_DOUBLINGS
    # the least of several: what disturbs a measurement only ever adds
    ratio = min(seconds(read, bait(unit, ending, size)) for _ in range(3)) / min(
        seconds(read, bait(unit, ending, small)) for _ in range(5)
    )
    if ratio <= MOST_PER_DOUBLING**NUM_DOUBLINGS:
        return ""
    return f"{unit!r} with {ending!r}: {small} to {size} characters take {ratio:.0f} times as long"


def test_growth_is_noticed():
    assert too_much(lambda text: [text.count("b", n) for n in range(len(text) // 4)], "a", "")
    assert not too_much(lambda text: sum(ord(char) for char in text), "a", "")


@pytest.mark.parametrize("name", ALL_READERS)
def test_time_grows_with_the_length_of_an_answer(name):
    read = ALL_READERS[name]
    wrong = [
        told for n, unit in enumerate(UNITS) if (told := too_much(read, unit, ENDINGS[n % len(ENDINGS)]))
    ]
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL_READERS)
def test_time_grows_with_the_length_whatever_the_end(name):
    read = ALL_READERS[name]
    pairs = [
        (unit, ending)
        for unit in UNITS
        for ending in (*ENDINGS, "'", "$", " A", "\n答案是 A\n", "DONE", "\\boxed{1}")
    ]
    assert not [told for unit, ending in pairs if (told := too_much(read, unit, ending, LONGEST_SLOW))]


ODD = ["", "\0", "\ud800", "\udfff\ud800", "\x85\u2028\u2029", "\u202e", "\ufeff", "'\0'", "'\ud800'", "'\\x'", "'\\N{x}'", "'\\ud800'", "$\\", "\\boxed{", "```", "9" * 5000,
       "1/" + "9" * 5000, "9" * 5000 + "/1", "1e999999999", "\\frac", "\\sqrt", "\\text{ \\text{ ", "²", "٣", "½", "１２", "Ａ", "İ", "ß", "ﬁ"]  # fmt: skip


@pytest.mark.parametrize("name", ALL_READERS)
def test_odd_text_is_read_without_an_error(name):
    for text in ODD:
        for around in (
            text,
            f"The answer is {text}",
            f"\\boxed{{{text}}}",
            f"答案是{text}。",
            f"```python\n{text}\n```",
            f"${text}$",
            f"a={text}",
        ):
            ALL_READERS[name](around)
            ALL_READERS[name](around * 2)
