r"""Whether two LaTeX answers have the same value: numbers, fractions, roots, tuples, sets, intervals, formulas.

Used by the profile `fixed` only. Strings are compared by OpenCompass' rules first; what differs is evaluated, letters
at three fixed points. There is no algebra system behind it: time and depth are bounded by the length of the answer.
"""

import cmath
import math
import re

from internlm2.eval.extract import equivalent
from internlm2.eval.extract.formula import evaluate

MAX_CHARACTERS = 300  # longer answers are compared as strings
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")  # three letters are a word, not a product
MAX_PARTS = 12  # longer lists are compared in order
_POINTS = (0.7312, 1.3791, 2.6173)  # where letters are tried; no answer of a textbook
_NUMBER = r"-?(?:\d+|\d{1,3}(?:(?:,|\{,\}|,\\!)\d{3})+)(?:\.\d+)?"
_PAIRS = {"(": ")", "[": "]", "\\{": "\\}"}


def same_values(answer: str, gold: str) -> bool:
    """Whether an answer is right, whatever its spelling. An empty answer never is."""
    if not answer.strip():
        return False
    if max(len(answer), len(gold)) > MAX_CHARACTERS:
        return answer.strip() == gold.strip()
    answer, gold = _plain(answer), _plain(gold)
    if answer == gold or equivalent.version_1(answer, gold) or equivalent.version_2(answer, gold):
        return True
    return _same(answer, gold, depth=0)


def _plain(text: str) -> str:
    """Without dollar signs, spacing, units and what else carries no value."""
    text = text.strip().rstrip(".。").replace("\\$", "").replace("$", "")
    text = re.sub(r"\\(?:left|right|!|,|;|:|quad|qquad|displaystyle|limits)(?![a-zA-Z])", "", text)
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\(?:mathrm|mathbf|mathit|textbf|text|mbox|operatorname)\{([^{}]*)\}", _words, text)
    text = re.sub(r"\^\{?\\circ\}?|\\%|%|\\degree|°", "", text)
    for mark, sign in (
        ("，", ","),
        ("；", ";"),
        ("（", "("),
        ("）", ")"),
        ("\\infinity", "\\infty"),
        ("∞", "\\infty"),
    ):
        text = text.replace(mark, sign)
    return " ".join(text.split())


def _words(found: re.Match[str]) -> str:
    """A letter or a choice in words stays; units go where they follow a number."""
    word = found[1].strip()
    before = found.string[: found.start()].rstrip()
    return "" if before.endswith(tuple("0123456789})")) and len(word.strip("()")) > 1 else word


def _same(answer: str, gold: str, *, depth: int) -> bool:
    answer, gold = (_right_side(text.strip()).removeprefix("+") for text in (answer, gold))
    if answer.replace(" ", "") == gold.replace(" ", ""):
        return True
    if depth < 3:
        for separator in ("\\cup", ";", ","):
            if separator == "," and _is_number(answer) and _is_number(gold):
                continue
            found = _same_parts(answer, gold, separator, depth=depth)
            if found is not None:
                return found
    return _same_numbers(answer, gold)


def _right_side(text: str) -> str:
    """What a single letter, or a function of one, is said to be; `x \\in` goes."""
    text = re.sub(r"^[a-zA-Z]\s*\\in(?![a-z])\s*", "", text)
    sides = text.split("=")
    is_named = len(sides) == 2 and re.fullmatch(r"\s*[a-zA-Z]\w?(?:\([a-z]\))?\s*", sides[0])
    return sides[1].strip() if is_named else text


def _is_number(text: str) -> bool:
    return re.fullmatch(_NUMBER, text.replace(" ", "")) is not None


def _same_parts(answer: str, gold: str, separator: str, *, depth: int) -> bool | None:
    """Part by part; None where neither has several parts at this separator."""
    open_a, inside_a = _bracket(answer)
    open_g, inside_g = _bracket(gold)
    parts_a, parts_g = _split(inside_a, separator), _split(inside_g, separator)
    if separator == "\\cup":
        parts_a, parts_g = _split(answer, separator), _split(gold, separator)
    if len(parts_a) == len(parts_g) == 1:
        return None
    if len(parts_a) != len(parts_g) or (separator == "," and open_a and open_g and open_a != open_g):
        return False
    if all(_same(a, g, depth=depth + 1) for a, g in zip(parts_a, parts_g, strict=True)):
        return True
    is_ordered = separator == ";" or (separator == "," and "(" in open_g + open_a)
    return not is_ordered and len(parts_g) <= MAX_PARTS and _same_set(parts_a, parts_g, depth=depth)


def _same_set(parts: list[str], golds: list[str], *, depth: int) -> bool:
    """Whether each part is one of the golds, each of which counts once."""
    rest = list(golds)
    for part in parts:
        found = next((gold for gold in rest if _same(part, gold, depth=depth + 1)), None)
        if found is None:
            return False
        rest.remove(found)
    return True


def _bracket(text: str) -> tuple[str, str]:
    """The brackets around a whole text, such as "(]", and what they hold; "" and the text where there are none."""
    for opening in _PAIRS:
        for closing in _PAIRS.values():
            if (
                text.startswith(opening)
                and text.endswith(closing)
                and len(text) > len(opening) + len(closing)
            ):
                inside = text[len(opening) : -len(closing)]
                if _split(inside, "\0") == [inside] and _is_balanced(inside):
                    return opening + closing, inside
    return "", text


def _is_balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if depth < 0:
            return False
    return depth == 0


def _split(text: str, separator: str) -> list[str]:
    """The parts of a text at separators outside brackets and braces."""
    parts, depth, start, place = [], 0, 0, 0
    while place < len(text):
        character = text[place]
        depth += (character in "([{") - (character in ")]}")
        if depth <= 0 and text.startswith(separator, place):
            parts.append(text[start:place])
            place += len(separator)
            start = place
            continue
        place += 1
    return [*parts, text[start:]]


def _same_numbers(answer: str, gold: str) -> bool:
    if _WORD.search(answer) or _WORD.search(gold):
        return False
    without = [re.sub(r"(?<=\d)(?:,|\{,\}|,\\!)(?=\d{3}(?!\d))", "", text) for text in (answer, gold)]
    for point in _POINTS:
        values = [evaluate(text, letters_near=point) for text in without]
        first, second = values
        if first is None or second is None or not (_is_finite(first) and _is_finite(second)):
            return False
        if not cmath.isclose(first, second, rel_tol=1e-9, abs_tol=1e-12):
            return False
    return True


def _is_finite(value: complex) -> bool:
    return math.isfinite(value.real) and math.isfinite(value.imag)
