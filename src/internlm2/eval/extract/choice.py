r"""Letters out of answers, exactly as OpenCompass read them in January and February 2024.

Source of the rules: open-compass/opencompass `utils/text_postprocessors.py` at b4afe3e7 and d34ba111,
https://github.com/open-compass/opencompass. The patterns are the protocol and stand as they were; the search is ours,
because three of the patterns take quadratic time on hostile text.
"""

import re
from collections.abc import Callable

# `@` stands for one of the allowed letters. The first pattern that matches anywhere decides, so the order is part of
# the protocol. `1.` really means: a one, then any character.
_PATTERNS = (
    r"答案是?\s?(@)", r"答案是?\s?：(@)", r"答案是?\s?:(@)",
    r"答案应该?是\s?(@)", r"答案应该?选\s?(@)", r"答案为\s?(@)", r"答案选\s?(@)", r"选择?\s?(@)",
    r"只有选?项?\s?(@)\s?是?对", r"只有选?项?\s?(@)\s?是?错", r"只有选?项?\s?(@)\s?不?正确", r"只有选?项?\s?(@)\s?错误",
    r"说法不?对选?项?的?是\s?(@)", r"说法不?正确选?项?的?是\s?(@)", r"说法错误选?项?的?是\s?(@)",
    r"(@)\s?是正确的", r"(@)\s?是正确答案", r"选项\s?(@)\s?正确", r"所以答\s?(@)",
    r"1.\s?(@)[.。$]?$", r"所以\s?(@[.。$]?$)", r"所有\s?(@[.。$]?$)",
    r"[\s，：:,](@)[。，,\.]?$", r"[\s，,：:][故即](@)[。\.]?$", r"[\s，,：:]因此(@)[。\.]?$",
    r"[是为。]\s?(@)[。\.]?$", r"因此\s?(@)[。\.]?$", r"显然\s?(@)[。\.]?$",
    r"答案是\s?(\S+)(?:。|$)", r"答案应该是\s?(\S+)(?:。|$)", r"答案为\s?(\S+)(?:。|$)",
    r"[Tt]he answer is (@)", r"[Tt]he answer is option (@)",
    r"[Tt]he correct answer is (@)", r"[Tt]he correct answer is option (@)",
    r"[Tt]he answer to the question is (@)",
    r"^选项\s?(@)", r"^(@)\s?选?项",
    r"(\s|^)@[\s。，,：:\.$]", r"(\s|^)@(\s|$)",
    r"1.\s?(.*?)$",
    r"(@):", r"@",
)  # fmt: skip
_WORD = r"\s?(\S+)(?:。|$)"
_REST_OF_LINE = r"1.\s?(.*?)$"


def first_capital(text: str) -> str:
    """The first upper-case character of any alphabet, or ""; "The answer is B" gives "T"."""
    return next((character for character in text if character.isupper()), "")


def first_capitals(text: str) -> str:
    """The first run of the letters A-D, or ""; "A、C" gives "A"."""
    found = re.search("[A-D]+", text)
    return found[0] if found else ""


def first_option(text: str, options: str) -> str:
    """The option that the first matching one of 43 patterns points to, or "".

    options: the allowed letters, such as "ABCD"; within a match the first of them in this order is taken. Takes time
    linear in the length of the text.
    """
    for pattern in _PATTERNS:
        matched = _finder(pattern, options)(text)
        for letter in options if matched else "":
            if letter in matched:
                return letter
    return ""


def _finder(pattern: str, options: str) -> Callable[[str], str]:
    if pattern.endswith(_WORD):
        return lambda text: _cue_and_word(text, pattern.removesuffix(_WORD))
    if pattern == _REST_OF_LINE:
        return _one_and_rest
    compiled = re.compile(pattern.replace("@", f"[{options}]"))

    def find(text: str) -> str:
        found = compiled.search(text)
        return found[0] if found else ""

    return find


def _cue_and_word(text: str, cue: str) -> str:
    r"""What `cue\s?(\S+)(?:。|$)` matches first, or "", in linear time.

    Where the first cue of a run of visible characters fails, the others inside that run fail too, but for one at its
    very end, whose word is the next run.
    """
    start = text.find(cue)
    while start >= 0:
        found = re.compile(r"\s?(\S++)").match(text, start + len(cue))
        if found is None:
            start = text.find(cue, start + 1)
            continue
        end = found.end()
        if end == len(text) or text[end:] == "\n":
            return text[start:end]
        stop = text.rfind("。", found.start(1) + 1, end)
        if stop >= 0:
            return text[start : stop + 1]
        start = text.find(cue, max(start + 1, end - len(cue)))
    return ""


def _one_and_rest(text: str) -> str:
    r"""What `1.\s?(.*?)$` matches first, or "": only the last line can, or three characters before it."""
    last_line = text.rfind("\n", 0, len(text) - text.endswith("\n")) + 1
    found = re.compile(_REST_OF_LINE).search(text, max(0, last_line - 3))
    return found[0] if found else ""
