"""The rules of OpenCompass spelled the plain way, slow on long text: oracles for `internlm2.eval.extract`."""

import ast
import re

from internlm2.eval.extract.choice import _PATTERNS
from internlm2.eval.extract.latex import _REMOVED, _REPLACED


def first_option(text: str, options: str) -> str:
    for pattern in _PATTERNS:
        found = re.search(pattern.replace("@", f"[{options}]"), text)
        for letter in options if found else "":
            if letter in found[0]:
                return letter
    return ""


def normalise(text: str) -> str:
    for before, after in _REPLACED:
        text = text.replace(before, after)
    for removed in _REMOVED:
        text = text.replace(removed, "")
    for command in (r"\\text\{(.*?)\}", r"\\textbf\{(.*?)\}", r"\\overline\{(.*?)\}", r"\\boxed\{(.*)\}"):
        text = re.sub(command, r"\1", text)
    for pattern in ("finalansweris(.*)", "answer?is:?(.*)", r"oxed\{(.*?)\}", r"\$(.*?)\$"):
        found = re.findall(pattern, text)
        text = found[-1] if found else text
    text = text.strip()
    if "rac" in text and "\\frac" not in text:
        text = text.replace("rac", "\\frac")
    text = re.sub("(frac)([^{])(.)", r"frac{\2}{\3}", text)
    text = re.sub("(sqrt)([^{])", r"sqrt{\2}", text).replace("$", "")
    return text.replace(",", "") if text.replace(",", "").isdigit() else text


def equivalent_2(first: str, second: str) -> bool:
    try:
        return _plain(first) == _plain(second)
    except ValueError:
        return first == second


def _plain(text: str) -> str:
    text = text.strip().replace("\n", "").rstrip(".").replace("\\!", "").replace("\\ ", "")
    text = text.replace("\\\\", "\\").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac").replace("\\left", "").replace("\\right", "")
    without_unit = re.sub(r"\\text{.*?}$", "", text).strip()
    text = without_unit or text
    for removed in ("^{\\circ}", "^\\circ", "\\$", "$", "\\text", "x\\in", "\\%", "%"):
        text = text.replace(removed, "")
    text = text.replace(" .", " 0.").replace("{.", "{0.").replace("\\cdot", "").replace("infinity", "\\infty")
    text = text if "\\infty" in text else text.replace("inf", "\\infty")
    text = text.replace("+\\inity", "\\infty").replace("and", "").replace("\\mathbf", "")
    text = re.sub(r"\\mbox{.*?}", "", text)
    text = text.replace("j", "i") if "i" not in text else text
    text = re.sub(r"(\d+)\.0+([^\d])", r"\1\2", text)
    text = re.sub(r"(\d+)\.0+$", r"\1", text)
    if not text:
        return text
    text = f"0{text}" if text[0] == "." else text
    sides = text.split("=")
    text = sides[1] if len(sides) == 2 and len(sides[0]) <= 2 else text
    text = _fractions(re.sub(r"\\sqrt(\w+)", r"\\sqrt{\1}", text).replace(" ", ""))
    if text.count("/") != 1:
        return text
    above, below = map(int, text.split("/"))
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text


def _fractions(text: str) -> str:
    """From left to right: a bare numerator is one sign, a bare denominator too."""
    parts = text.split("\\frac")
    done = parts[0]
    for part in parts[1:]:
        if part[:1] == "{":
            done += "\\frac" + part
            continue
        if len(part) < 2:
            return text
        bare = part[1] if part[1] == "{" else "{" + part[1] + "}"
        done += "\\frac{" + part[0] + "}" + bare + part[2:]
    return done


def cloze(text: str) -> str | None:
    for cue in ("The answer is therefore", "答案是"):
        if text.startswith(cue):
            text = text[len(cue) :].strip()
        elif cue in text:
            text = text[text.rfind(cue) + len(cue) :].strip()
    formulas = re.findall(r"\$(.*)\$", text)
    answer = formulas[-1] if formulas else None
    if answer and "=" in answer:
        answer = answer.split("=")[-1].lstrip(" ")
    if answer:
        return answer
    if "=" in text:
        return text.split("=")[-1].lstrip(" ").rstrip(".").split("\\n")[0]
    numbers = re.findall(r"(?:\$)?\d+(?:\.\d+)?(?![\w\d])", text)
    return numbers[-1] if numbers else None


def literal(text: str) -> str:
    """What Python makes of a text that is one or more quoted texts; else the text."""
    try:
        value = ast.literal_eval(text.strip(" \t"))
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, str) else text
