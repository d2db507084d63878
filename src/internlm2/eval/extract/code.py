r"""Programs out of answers, as OpenCompass cut them in January 2024.

Source of the rules: open-compass/opencompass `datasets/humaneval.py` and `datasets/mbpp.py` at b4afe3e7,
https://github.com/open-compass/opencompass. The original first runs Python's `eval` on the answer, for models that
return the repr of their text. NOTE: we never do; an answer that is nothing but text in quotes is read as such, which
is the case that `eval` was there for. An answer that is any other expression stays as it is.
"""

import ast
import re

_LITERAL = r"""(?>'''(?:[^'\\]|\\.|'(?!''))*+'''|\"\"\"(?:[^"\\]|\\.|"(?!""))*+\"\"\"
    |'(?!'')(?:[^'\\\n]|\\.)*+'|"(?!"")(?:[^"\\\n]|\\.)*+")"""
_QUOTED = re.compile(
    rf"(?:[ \t]*|(?:[ \t]*\n)+){_LITERAL}(?:[ \t]*{_LITERAL})*+[ \t]*(?:\#[^\n]*)?(?:\n(?:[ \t]*\n)*)?",
    re.DOTALL | re.VERBOSE,
)
_ESCAPE = re.compile(r"\\([\n\\'\"abfnrtv0-7xNuU]|)")


def humaneval_1(text: str) -> str:
    """The body up to the first blank line, indented by four blanks."""
    text = _after_imports(_first_block(text)).partition("\n\n")[0].lstrip("\n")
    text = _without_def(text)
    if text.startswith("    "):
        return text
    return "    " + text.lstrip() if text.startswith(" ") else _indented(text)


def humaneval_2(text: str) -> str:
    """The body up to the first line that is indented less than its first line, without empty lines."""
    text = _after_imports(_first_block(_unquoted(text).lstrip("\n")))
    text = _without_def("\n".join(line for line in text.split("\n") if line).lstrip("\n"))
    text = "    " + text.lstrip() if text.startswith(" ") else _indented(text)
    lines = text.split("\n")
    first_width: int | None = None
    for number, line in enumerate(lines):
        code = line.strip()
        if not code or code[0] in "'\"#":
            continue
        width = len(line.rstrip()) - len(code)
        if first_width is None:
            first_width = width
        elif width < first_width:
            return "\n".join(lines[:number])
    return text


def mbpp(text: str) -> str:
    """What stands between the marks BEGIN and DONE, without one quote at each end and without any backslash."""
    text = _first_block(_unquoted(text)).strip()
    done = re.search(r"('\s*|)(\[DONE\]|DONE)", text)
    text = text[: done.start()] if done else text
    begin = re.search(r"(\[BEGIN\]|BEGIN)('\s*|)", text)
    text = (text[begin.end() :] if begin else text).strip()
    return text.removeprefix("'").removesuffix("'").replace("\\", "")


def _unquoted(text: str) -> str:
    """The text of one quoted literal, where the answer is that and nothing else."""
    if not _QUOTED.fullmatch(text):
        return text
    try:
        # an unknown escape stays as it is, and Python would warn of it
        value = ast.literal_eval(_ESCAPE.sub(lambda found: found[0] if found[1] else "\\\\", text.strip()))
    except (ValueError, SyntaxError, MemoryError):  # such as "\x" without digits
        return text
    return value if isinstance(value, str) else text


def _first_block(text: str) -> str:
    """The first fenced block without its language; what follows the fence where it does not close."""
    _, fence, rest = text.partition("```")
    if not fence:
        return text
    block, closing, _ = rest.partition("```")
    if closing and not block.startswith("\n"):
        block = block[block.find("\n") + 1 :]
    return block


def _after_imports(text: str) -> str:
    """From the line after the first `def`, where the text begins with an import."""
    if not text.strip().startswith(("from", "import")):
        return text
    start = text.find("def")
    return text if start < 0 else text[text.find("\n", start) + 1 :]


def _without_def(text: str) -> str:
    return text.partition("\n")[2] if text.strip().startswith("def") else text


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))
