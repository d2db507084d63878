"""The reading of the profile `fixed`: letters, numbers, formulas and programs as a careful reader takes them."""

import pytest

from internlm2.eval.extract import mended
from internlm2.eval.extract.value import same_values


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("B.", "B"), ("(B)", "B"), ("**B**", "B"), ("B: because A", "B"), ("The answer is (B), not A.", "B"),
        ("(A) because B is wrong", "A"), ("A man walks. So the answer is C", "C"), ("Answer: D", "D"), ("答案：C", "C"),
        ("答案应该是 B。", "B"), ("故选C", "C"), ("I think\nC\n", "C"), ("So it must be (D)", "D"), ("\\boxed{\\text{B}}", "B"),
        ("the answer is A? No, the answer is option B.", "B"), ("A man walks", ""), ("", ""), ("Apple", ""), ("E", ""),
        ("The answer is Apple", ""),
    ],
)  # fmt: skip
def test_choice(text, letter):
    assert mended.choice(text, "ABCD") == letter


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("AC", "AC"), ("A、C", "AC"), ("(A)(C)", "AC"), ("答案是：（A）、（B）和（D）", "ABD"), ("答案是CA", "AC"),
        ("The answer is B and D.", "BD"), ("A is wrong. 答案：BC", "BC"), ("", ""), ("none", ""), ("Because", ""),
    ],
)  # fmt: skip
def test_choices(text, letters):
    assert mended.choices(text, "ABCD") == letters


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", "18"), ("The answer is 18.", "18"), ("so 5*3=15", "15"), ("it costs $1,234.50 today", "1234.50"), ("5-3=2", "2"),
        ("a loss: -10", "-10"), ("The answer is 4 after 12 days", "4"), ("\\boxed{7} of 9", "7"), ("no", ""), ("10-3", "3"),
    ],
)  # fmt: skip
def test_number(text, number):
    assert mended.number(text) == number


def test_numbers_are_equal_by_value():
    assert mended.same_numbers("18.0", "18")
    assert not mended.same_numbers("18.5", "18")
    assert not mended.same_numbers("", "18")
    assert not mended.same_numbers("9" * 200, "18")


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("The final answer is $[2,5)$. I hope it is correct.", "[2,5)"), ("so \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{{3}}", "3"), ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"), ("the answer is 3.5 dollars. ok", "3.5 dollars"),
        ("The final answer is $\\$36$. I", "\\$36"), ("we get $x$ and $y=2$", "y=2"), ("one\n7.", "7"), ("", ""),
        ("\\boxed{1} and \\boxed{2", "\\boxed{1} and \\boxed{2"),
    ],
)  # fmt: skip
def test_formula(text, formula):
    assert mended.formula(text) == formula


@pytest.mark.parametrize(
    ("answer", "gold", "is_same"),
    [
        ("0.5", "\\frac12", True), ("\\dfrac{3}{6}", "\\frac{1}{2}", True), ("10,080", "10080", True), ("4,6,14,15", "15, 14,6,4", True),
        ("(1,2)", "(2,1)", False), ("[0,2]", "(0,2)", False), ("[0, 2.0]", "[0,2]", True), ("x=5", "5", True), ("2\\sqrt{2}", "\\sqrt8", True),
        ("(x+1)^2", "x^2+2x+1", True), ("(x+1)^2", "x^2+x+1", False), ("3\\frac{1}{2}", "\\frac72", True), ("\\text{even}", "neve", False),
        ("5\\text{ cm}", "5", True), ("90^\\circ", "90", True), ("(-\\infty,0)\\cup(0,1]", "(0,1]\\cup(-\\infty, 0)", True),
        ("\\frac{2}{\\sqrt{2}}", "\\sqrt{2}", True), ("\\pi/2", "\\frac{\\pi}{2}", True), ("", "0", False), ("0", "", False), ("1/0", "2", False),
        ("2^{10}", "1024", True), ("9^{9^{9^9}}", "2", False), ("1-5i", "1-5\\mathrm{i}", True), ("\\text{(A)}", "A", True), ("A", "B", False),
        ("$5$;$10$", "5;10", True), ("10;5", "5;10", False), ("0.333", "\\frac13", False), ("1,2", "1,2,3", False), ("+5", "5", True),
        ("\\{1,2\\}", "\\{2,1\\}", True), ("((((1", "1", False), ("\\frac", "1", False), ("x^2x", "x^3", True),
    ],
)  # fmt: skip
def test_same_values(answer, gold, is_same):
    assert same_values(answer, gold) is is_same


def test_long_answers_are_compared_as_they_stand():
    assert same_values("1+" * 200 + "1", "1+" * 200 + "1")
    assert not same_values("1+" * 200 + "1", "201")


def test_function_bodies():
    assert mended.function_body("    return 1\n\n    # x\nprint(2)", "f") == "    return 1\n\n    # x"
    assert mended.function_body("return [\n    1,\n]\n", "f") == "    return [\n        1,\n    ]\n"
    assert mended.function_body("  return 1\n", "f") == "    return 1\n"
    assert (
        mended.function_body("```python\nimport re\n\ndef f(x):\n    return x\n```\nok", "f")
        == "\nimport re\n\ndef f(x):\n    return x\n"
    )
    assert mended.function_body("```\n    return 1\n", "f") == "    return 1\n"


def test_whole_programs():
    for text in (
        "[BEGIN]\n 'x = \"\\d\"' \n[DONE]",
        'x = "\\d"\n[DONE]\nmore',
        '```python\nx = "\\d"\n```\nok',
        "'x = \"\\d\"'",
    ):
        assert mended.whole_program(text) == 'x = "\\d"'
    assert mended.whole_program("def f(): return 'x'") == "def f(): return 'x'"
