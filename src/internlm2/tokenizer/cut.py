"""Cuts long text where no piece of the vocabulary can cross, so that parts can be encoded alone.

BPE only ever makes symbols that are pieces. If no piece holds the characters `ab` side by side, then no
merge crosses a place `a|b`: the merges on its left and right are the same with and without the cut, in the
same order. sentencepiece slows down with length (one queue spans the whole text), so cutting pays; the ids
stay equal. docs/tokenizer.md has the proof, benchmarks/results/tokenizer.md the figures.
"""

from collections.abc import Iterable

# Shorter blocks cost more calls than they save; see benchmarks/results/tokenizer.md.
BLOCK_CHARACTERS = 2048
MAX_WHOLE_CHARACTERS = 8192


class Cuts:
    """Knows which pairs of characters some piece holds, and cuts at the others."""

    def __init__(
        self,
        pieces: Iterable[str],
        *,
        block_characters: int = BLOCK_CHARACTERS,
        max_whole_characters: int = MAX_WHOLE_CHARACTERS,
    ) -> None:
        """pieces: everything that merging or matching can produce, with spaces as spaces.

        max_whole_characters: texts up to this length stay whole; longer ones become blocks of about
        block_characters.
        """
        self.block_characters = block_characters
        self.max_whole_characters = max_whole_characters
        self._joined: set[str] = set()
        for piece in pieces:
            self._joined.update(map(str.__add__, piece, piece[1:]))

    def blocks(self, text: str) -> list[str]:
        """Blocks that join to `text`; longer than wanted where there is no safe place."""
        if len(text) <= self.max_whole_characters:
            return [text]
        blocks: list[str] = []
        start, position = 0, self.block_characters
        while position < len(text):
            # NOTE: sentencepiece reads a U+2581 in the text as a space, so the two must count as one here.
            if text[position - 1 : position + 1].replace("\u2581", " ") in self._joined:
                position += 1
            else:
                blocks.append(text[start:position])
                start, position = position, position + self.block_characters
        blocks.append(text[start:])
        return blocks
