r"""What stands in the last `\boxed{...}`, found by counting braces."""

import re


def last_boxed(text: str) -> str | None:
    r"""The last `\boxed` (else `\fbox`) with its braces, or None where there is none or it does not close."""
    start = text.rfind("\\boxed")
    if start < 0:
        start = text.rfind("\\fbox")
    if start < 0:
        return None
    depth = 0
    for brace in re.compile("[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if brace[0] == "}" and depth == 0:
            return text[start : brace.end()]
    return None


def boxed_content(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds; None also for `\fbox{...}` and `\boxed 3`, as OpenCompass has it."""
    found = last_boxed(text)
    if found is None or not found.startswith("\\boxed{"):
        return None
    return found[len("\\boxed{") : -1]
