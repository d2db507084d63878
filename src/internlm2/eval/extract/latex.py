r"""MATH answers as OpenCompass read them in January 2024: version 1 for base models, version 2 for chat models.

Source of the rules: open-compass/opencompass `datasets/math.py` at b4afe3e7 (https://github.com/open-compass/opencompass),
itself after Minerva (arXiv 2206.14858, appendix D.1). The tables are the protocol; the code is ours and linear in time:
where OpenCompass searches with a lazy pattern from every opening, we stop at the first one that does not close.
"""

import re

from internlm2.eval.extract.boxed import boxed_content

_REPLACED = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"),
    (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"), ("\\le", "<"),
)  # fmt: skip
_REMOVED = (
    "square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", "\\ldots", "sue",
    "points", "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges",
    "students", "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2",
    "\\text{}^3", "\\text{\n}", "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"',
    "\\dots", "\n", "\r", "\f",
)  # fmt: skip
_PARTS = re.compile(r"answer?is:?")


def version_1(text: str) -> str:
    """The first piece between full stops that says "final answer", else the first piece, normalised."""
    pieces = text.split(".")
    return _normalise(next((piece for piece in pieces if "final answer" in piece.lower()), pieces[0]))


def version_2(text: str) -> str:
    r"""The content of the last `\boxed`; without one as version 1, and "answer is" counts too."""
    content = boxed_content(text)
    if content is not None:
        doubled = re.match(r"\{(.*)\}$", content)
        content = doubled[1] if doubled else content
    if content:
        return content
    pieces = text.split(".")
    cue = re.compile("final answer|answer is")
    return _normalise(next((piece for piece in pieces if cue.search(piece.lower())), pieces[0]))


def _normalise(answer: str) -> str:
    for before, after in _REPLACED:
        answer = answer.replace(before, after)
    for removed in _REMOVED:
        answer = answer.replace(removed, "")
    for command in ("\\text{", "\\textbf{", "\\overline{"):
        answer = _unwrap(answer, command)
    start, end = answer.find("\\boxed{"), answer.rfind("}")
    if start >= 0 and start + len("\\boxed{") <= end:
        answer = answer[:start] + answer[start + len("\\boxed{") : end] + answer[end + 1 :]
    if "finalansweris" in answer:
        answer = answer.partition("finalansweris")[2]
    cue = _PARTS.search(answer)
    if cue is not None:
        answer = answer[cue.end() :]
    answer = _last_between(answer, "oxed{", "}")
    answer = _last_between(answer, "$", "$").strip()
    if "rac" in answer and "\\frac" not in answer:
        answer = answer.replace("rac", "\\frac")
    answer = re.sub(r"(frac)([^{])(.)", r"frac{\2}{\3}", answer)
    answer = re.sub(r"(sqrt)([^{])", r"sqrt{\2}", answer).replace("$", "")
    without_commas = answer.replace(",", "")
    return without_commas if without_commas.isdigit() else answer


def _unwrap(text: str, opening: str) -> str:
    """Take each `opening` and the next closing brace away, and keep what is between."""
    parts, position = [], 0
    while (start := text.find(opening, position)) >= 0:
        inside = start + len(opening)
        end = text.find("}", inside)
        if end < 0:
            break
        parts += [text[position:start], text[inside:end]]
        position = end + 1
    return "".join([*parts, text[position:]])


def _last_between(text: str, opening: str, closing: str) -> str:
    """The last piece between marks that do not overlap, or the text itself where there is none."""
    found, position = text, 0
    while (start := text.find(opening, position)) >= 0:
        end = text.find(closing, start + len(opening))
        if end < 0:
            break
        found, position = text[start + len(opening) : end], end + 1
    return found
