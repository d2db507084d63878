r"""Answers of AGIEval's cloze sets and of BBH, as OpenCompass read them in January 2024.

Source of the rules: open-compass/opencompass `datasets/agieval/post_process.py` and `datasets/bbh.py` at b4afe3e7,
https://github.com/open-compass/opencompass, the first after https://github.com/ruixiangcui/AGIEval.
"""

import re

from internlm2.eval.extract.boxed import last_boxed

_CUES = ("The answer is therefore", "答案是")
_NUMBER = re.compile(r"\$?(?<!\d)\d++(?:\.\d++)?(?!\w)")


def cloze(text: str) -> str | None:
    """The answer to a cloze question; None where nothing looks like one.

    The last box, else the last text between dollar signs of one line, else what follows the last `=`, else the last
    number. Of `x=3` only the 3 is kept.
    """
    for cue in _CUES:
        if cue in text:
            text = text[len(cue) :] if text.startswith(cue) else text[text.rfind(cue) + len(cue) :]
            text = text.strip()
    if "\\boxed" in text:
        found = last_boxed(text)
        if found is None or not found.startswith("\\boxed{"):
            return None
        return _right_side(found[len("\\boxed{") : -1])
    formulas = re.findall(r"\$(.*)\$", text)
    answer = _right_side(formulas[-1]) if formulas else ""
    if answer:
        return answer
    if "=" in text:
        return text.rpartition("=")[2].lstrip(" ").rstrip(".").partition("\\n")[0]
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def _right_side(text: str) -> str:
    _, equals, right = text.rpartition("=")
    return right.lstrip(" ") if equals else text


def bbh_choice(text: str) -> str:
    """The letter after the first "answer is ": one in brackets, else the first capital, else the text."""
    text = _after_cue(text)
    found = re.search(r"\(([A-Z])", text) or re.search("([A-Z])", text)
    return found[1] if found else text


def bbh_text(text: str) -> str:
    """The line after the first "answer is ", without one full stop at its end."""
    line = _after_cue(text).partition("\n")[0].strip()
    return line.removesuffix(".").strip() if line.endswith(".") else line


def _after_cue(text: str) -> str:
    pieces = text.split("answer is ", 2)
    return pieces[1].strip() if len(pieces) > 1 else text
