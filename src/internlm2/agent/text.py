"""Text that a tool or a model wrote, made fit to be read: by a model, by a file, by a terminal.

Control characters are dropped or shown, so that nothing steers a terminal; lone surrogates become U+FFFD.
"""

import re

from internlm2.tokenizer.special import OLD_SPELLINGS

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
# C0 and C1 but for tab and line break, lone surrogates, and what turns the direction of text round.
_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
_CHAT_MARKER = re.compile(r"<\|[^\s<>|]{1,40}\|>|</?s>|" + "|".join(map(re.escape, OLD_SPELLINGS)))
_WORD_JOINER = "\u2060"


def clean(text: str) -> str:
    """Without escape sequences of terminals, with U+FFFD for other control characters."""
    text = _ANSI.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _UNSHOWN.sub("\ufffd", text)


def shorten(text: str, limit: int) -> str:
    """At most about `limit` characters: the beginning and the end, and a note of what is left out between."""
    if len(text) <= limit:
        return text
    head, tail = limit - limit // 4, limit // 4
    left_out = len(text) - head - tail
    return f"{text[:head]}\n[... {left_out:,} characters left out ...]\n{text[len(text) - tail :]}"


def break_markers(text: str) -> str:
    """Spellings of control tokens, made ordinary text by an invisible character after the first one."""
    return _CHAT_MARKER.sub(lambda found: found[0][0] + _WORD_JOINER + found[0][1:], text)
