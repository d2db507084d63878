r"""When two LaTeX answers are the same, by string rules alone: three versions that differ in small print.

`hendrycks` (https://github.com/hendrycks/math, used by AGIEval), `version_1` (OpenCompass, MATH of base models) and
`version_2` (OpenCompass, MATH of chat models), at b4afe3e7. A rule that fails falls back to plain equality.
"""

import re
from collections.abc import Callable


def hendrycks(first: str | None, second: str | None) -> bool:
    """As AGIEval compares: the rules of Hendrycks et al., which differ in what they do with a rule that fails."""
    return _same(first, second, lambda text: _plain_1(text, is_original=True))


def version_1(first: str | None, second: str | None) -> bool:
    """As the base models' MATH compares."""
    return _same(first, second, lambda text: _plain_1(text, is_original=False))


def version_2(first: str | None, second: str | None) -> bool:
    """As the chat models' MATH compares: more is stripped, but 0.5 is no longer a half."""
    return _same(first, second, _plain_2)


def _same(first: str | None, second: str | None, plain: Callable[[str], str]) -> bool:
    if first is None or second is None:
        return first is second
    try:
        return plain(first) == plain(second)
    except (ValueError, IndexError):
        return first == second


def _plain_1(text: str, *, is_original: bool) -> str:
    text = _common(text.replace("\n", "").replace("\\!", ""))
    for removed in ("^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(removed, "")
    pieces = text.split("\\text{ ")  # only units begin with a blank
    if len(pieces) > 2:
        raise ValueError("two units")
    text = pieces[0].replace("\\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = _value_alone(text)
    text = _fractions(_roots(text).replace(" ", ""), is_strict=is_original)
    return _slash("\\frac{1}{2}" if text == "0.5" else text, is_strict=not is_original)


def _plain_2(text: str) -> str:
    text = text.strip().replace("\n", "").rstrip(".").replace("\\!", "").replace("\\ ", "")
    text = _common(text.replace("\\\\", "\\"))
    has_unit = "\\text{" in text and text.endswith("}")
    text = (text[: text.find("\\text{")] if has_unit else text).strip() or text
    for removed in ("^{\\circ}", "^\\circ", "\\$", "$", "\\text", "x\\in", "\\%", "%"):
        text = text.replace(removed, "")
    text = text.replace(" .", " 0.").replace("{.", "{0.").replace("\\cdot", "")
    text = text.replace("infinity", "\\infty")
    if "\\infty" not in text:
        text = text.replace("inf", "\\infty")
    text = text.replace("+\\inity", "\\infty")
    for removed in ("and", "\\mathbf"):
        text = text.replace(removed, "")
    text = _remove_boxes(text)
    if "j" in text and "i" not in text:
        text = text.replace("j", "i")
    text = re.sub(r"(?<=\d)\.0+(\D)", r"\1", text)
    text = re.sub(r"(?<=\d)\.0+$", "", text)
    if not text:
        return text
    text = re.sub(r"\\sqrt(\w+)", r"\\sqrt{\1}", _value_alone(text)).replace(" ", "")
    return _slash(_fractions(text, is_strict=False), is_strict=True)


def _common(text: str) -> str:
    text = text.replace("\\\\", "\\")
    for before, after in (("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", "")):
        text = text.replace(before, after)
    return text


def _value_alone(text: str) -> str:
    """A zero before a leading point; `k=` goes."""
    text = f"0{text}" if text.startswith(".") else text
    sides = text.split("=")
    return sides[1] if len(sides) == 2 and len(sides[0]) <= 2 else text


def _remove_boxes(text: str) -> str:
    parts, position = [], 0
    while (start := text.find("\\mbox{", position)) >= 0 and (end := text.find("}", start)) >= 0:
        parts.append(text[position:start])
        position = end + 1
    return "".join([*parts, text[position:]])


def _roots(text: str) -> str:
    first, *rest = text.split("\\sqrt")
    return first + "".join(
        "\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in rest
    )


def _fractions(text: str, *, is_strict: bool) -> str:
    r"""Braces around the bare arguments of `\frac`; a `\frac` without two of them leaves the text alone."""
    first, *rest = text.split("\\frac")
    done = [first]
    for part in rest:
        if part.startswith("{"):
            done.append(part)
        elif len(part) < 2:
            if is_strict and not part:
                raise ValueError("a fraction without numerator")
            return text
        else:
            done.append(
                f"{{{part[0]}}}{part[1:]}" if part[1] == "{" else f"{{{part[0]}}}{{{part[1]}}}{part[2:]}"
            )
    return "\\frac".join(done)


def _slash(text: str, *, is_strict: bool) -> str:
    """`a/b` of whole numbers as a fraction. is_strict: raise ValueError when a side is none."""
    sides = text.split("/")
    if len(sides) != 2:
        return text
    try:
        above, below = int(sides[0]), int(sides[1])
    except ValueError:
        if is_strict:
            raise
        return text
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
