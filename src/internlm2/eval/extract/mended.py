r"""How the profile `fixed` reads answers: what a careful reader would take as the answer. See `profile.MENDS`.

These are our own rules, not those of the card. All are bounded in time by the length of the answer.
"""

import re
import textwrap
from fractions import Fraction

from internlm2.eval.extract.boxed import boxed_content

_CUE = re.compile(
    r"(?i:answer\s{1,3}(?:to\s{1,3}the\s{1,3}question\s{1,3})?is|\banswer\s{0,3}[:：]|答案\s{0,3}(?:应该|应)?(?:[是为选]\s?[：:]?|[：:]))"
)
_FILLING = r"[\s:：*(（\[\"'“$]{0,8}(?:(?i:option|choice|选项)\s{0,3})?[(（]?"
_NUMBER = re.compile(r"(?<![\d.)\w])-?\$?\s?\d[\d,]*(?:\.\d+)?|\d[\d,]*(?:\.\d+)?")


def choice(text: str, options: str) -> str:
    """The option that an answer settles on, or "".

    The letter in a box, else after the last "answer is", else one that begins the answer or stands in brackets or
    alone on a line.
    """
    letter = f"([{options}])"
    box = boxed_content(text)
    if box is not None and (inside := re.search(rf"(?<![A-Za-z\\]){letter}(?![A-Za-z])", box)):
        return inside[1]
    after_cue = re.compile(rf"{_FILLING}{letter}(?![A-Za-z])")
    found = [match for cue in _CUE.finditer(text) if (match := after_cue.match(text, cue.end()))]
    if found:
        return found[-1][1]
    if chosen := re.findall(rf"[选故]\s?{letter}(?![A-Za-z])", text):
        return chosen[-1]
    for pattern in (
        rf"\s*[(（\"'*]{{0,3}}{letter}[)）\"'*]{{0,3}}(?:[.。:：,，、)\n]|\s*$)",
        rf".*?[(（]{letter}[)）]",
        rf"(?s:.*?)(?:^|\n)\s{{0,8}}{letter}[.。]?\s{{0,8}}(?:\n|$)",
    ):
        if one := re.match(pattern, text):
            return one[1]
    return ""


def choices(text: str, options: str) -> str:
    """All options of the last clear statement, sorted, such as "AC" for "答案是(A)、(C)"; or ""."""
    one = rf"[(（]?[{options}][)）]?"
    several = rf"{one}(?:\s?(?:、|,|，|;|；|/|和|与|及|and|&)?\s?{one}){{0,6}}(?![A-Za-z])"
    after_cue = re.compile(rf"{_FILLING}({several})")
    found = [match[1] for cue in _CUE.finditer(text) if (match := after_cue.match(text, cue.end()))]
    if not found:
        found = re.findall(rf"(?<![A-Za-z])({several})", text)[:1]
    return "".join(sorted({letter for letter in found[-1] if letter in options})) if found else ""


def statement(text: str) -> str:
    """What follows the last "answer is", up to the end of the line; without one the last line with text."""
    cues = list(_CUE.finditer(text))
    if cues:
        return text[cues[-1].end() :].strip().partition("\n")[0].strip()
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def bracketed_letter(text: str) -> str:
    """The letter in brackets, or one that stands alone, else the plain words."""
    found = re.search(r"[(（]([A-Z])[)）]", text) or re.match(r"\W{0,4}([A-Z])(?![A-Za-z])", text)
    return found[1] if found else plain_words(text)


def plain_words(text: str) -> str:
    """Without capitals, quotes, markup, commas, a full stop and double blanks."""
    text = re.sub(r"[*\"'`“”$,]", " ", text).strip()
    return " ".join(text.removesuffix(".").lower().split())


def number(text: str) -> str:
    """The number in a box, else the first one after the last "answer is", else the last one; "" without any."""
    box = boxed_content(text)
    cues = list(_CUE.finditer(text))
    after = "" if not cues else text[cues[-1].end() :].partition("\n")[0]
    for place, index in ((box or "", -1), (after, 0), (text, -1)):
        found = _NUMBER.findall(place)
        if found:
            return re.sub(r"[,$\s]", "", found[index]).rstrip(".")
    return ""


def same_numbers(first: str, second: str) -> bool:
    """Whether two texts are the same number; False where one is none."""
    try:
        return Fraction(first) == Fraction(second) if max(len(first), len(second)) < 100 else first == second
    except (ValueError, ZeroDivisionError):
        return False


def formula(text: str) -> str:
    r"""The formula in the last box, else the one after the last "answer is", else the last one between dollar signs."""
    box = boxed_content(text)
    if box is not None:
        is_doubled = box.startswith("{") and box.endswith("}") and "}" not in box[1:-1].replace("\\}", "")
        return box[1:-1] if is_doubled else box
    cues = list(_CUE.finditer(text))
    if cues:
        after = text[cues[-1].end() :].strip(" :：")
        line = after.partition("\n")[0]
        # a dollar sign behind a backslash is money
        if found := re.match(r"(?<!\\)\$((?:[^$\\]|\\.)++)\$", after):
            return found[1]
        return re.split(r"\.\s|。", line, maxsplit=1)[0].strip().rstrip(".")
    formulas = re.findall(r"(?<!\\)\$((?:[^$\\\n]|\\.)++)\$", text)
    if formulas:
        return formulas[-1]
    lines = text.strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else ""


def blanks(text: str) -> str:
    """The answer to a question with one or more blanks: as `formula`, but all formulas of the statement, with `;`."""
    if "\\boxed" in text:
        return formula(text)
    answer = statement(text).rstrip(".。")
    if _CUE.search(text):
        return answer
    formulas = re.findall(r"(?<!\\)\$((?:[^$\\\n]|\\.)++)\$", answer)
    return ";".join(formulas) or formula(text)


def function_body(text: str, entry_point: str) -> str:
    """What to put behind the prompt of a function: its body, or a whole new definition of it.

    A fenced block is taken without the fence. What follows the body on the first column is cut, but for the end of a
    bracket.
    """
    block = _block(text)
    lines = block.split("\n")
    if re.search(rf"^(?:async )?def {re.escape(entry_point)}\b", block, re.MULTILINE):
        return f"\n{block}"
    first = next((line for line in lines if line.strip()), "")
    if not first.startswith((" ", "\t")):
        lines = textwrap.indent(textwrap.dedent(block), "    ").split("\n")
    elif (width := len(first) - len(first.lstrip(" "))) < 4:
        lines = [" " * (4 - width) + line if line is first else line for line in lines]
    for number_, line in enumerate(lines):
        if line.strip() and not line.startswith((" ", "\t", ")", "]", "}", "#", '"""', "'''")):
            return "\n".join(lines[:number_])
    return "\n".join(lines)


def whole_program(text: str) -> str:
    """A program between the marks BEGIN and DONE or in a fenced block, with quotes around it taken away."""
    text = _block(text).replace("\r\n", "\n").strip()
    text = re.split(r"\[DONE\]", text, maxsplit=1)[0]
    text = text.partition("[BEGIN]")[2] or text
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == "'":
        text = text[1:-1]
    elif text.startswith("'"):
        text = text[1:]
    return text


def _block(text: str) -> str:
    _, fence, rest = text.partition("```")
    if not fence:
        return text
    block = rest.partition("```")[0]
    language, _, program = block.partition("\n")
    return program if " " not in language.strip() else block
