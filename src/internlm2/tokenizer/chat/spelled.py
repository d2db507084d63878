"""Chats with tools in vocabularies that lack InternLM2's tokens for them, such as the demo model's.

The markers are spelled there: the same texts, as ordinary tokens. So the words of people, of tools and of
the history must not hold such a text: an invisible character breaks it up, and nobody can forge a call.
"""

import re
from collections.abc import Container, Sequence
from dataclasses import replace

from internlm2.tokenizer.chat.format import Segment
from internlm2.tokenizer.special import ACTION_END, ACTION_START, INTERPRETER, PLUGIN

_OF_TOOLS = (ACTION_START, ACTION_END, INTERPRETER, PLUGIN)
_WORD_JOINER = "\u2060"


def spelled_markers(known: Container[str]) -> tuple[str, ...]:
    """The markers of tools that a vocabulary with the special tokens `known` has to spell."""
    return tuple(marker for marker in _OF_TOOLS if marker not in known)


def spell(segments: Sequence[Segment], markers: Sequence[str]) -> list[Segment]:
    """The segments with `markers` as plain text, and text that already spelled one broken up."""
    if not markers:
        return list(segments)
    pattern = re.compile("|".join(map(re.escape, markers)))
    return [
        replace(segment, is_special=segment.text not in markers)
        if segment.is_special
        else replace(segment, text=pattern.sub(_broken, segment.text))
        for segment in segments
    ]


def _broken(found: re.Match[str]) -> str:
    return found[0][0] + _WORD_JOINER + found[0][1:]
