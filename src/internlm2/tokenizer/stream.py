"""Incremental decoding: ids in, text out as soon as it is whole, and never half a character.

A character may be spread over several ids (byte pieces, byte-level BPE) and a stop string over several
texts; both are held back until they are decided. What comes out joined equals decoding everything at once.
"""

import codecs
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import index

from internlm2.errors import TokenizerError


class StreamDecoder:
    """Turns ids into text piece by piece; made by `Tokenizer.stream()`. Constant work per id."""

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        *,
        names: Mapping[int, str],
        skip_special: bool = False,
        drop_leading_space: bool = False,
    ) -> None:
        """token_bytes: bytes of every id; names: special ids and how they are written."""
        self._token_bytes = token_bytes
        self._names = names
        self._skip_special = skip_special
        self._drop_leading_space = drop_leading_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: int | Iterable[int]) -> str:
        """Add one id or several; return the text that became certain. Raises TokenizerError."""
        return self._utf8.decode(b"".join(self._bytes([ids] if isinstance(ids, int) else ids)))

    def finish(self) -> str:
        """The rest: U+FFFD for bytes that never became a character."""
        return self._utf8.decode(b"", final=True)

    def _bytes(self, ids: Iterable[int]) -> Iterable[bytes]:
        for i in map(index, ids):  # numbers of numpy or torch would not be found among the names
            if not 0 <= i < len(self._token_bytes):
                raise TokenizerError(unknown_id(i, len(self._token_bytes)))
            if i in self._names:
                if not self._skip_special:
                    yield self._token_bytes[i]
            elif self._drop_leading_space:
                self._drop_leading_space = False
                yield self._token_bytes[i].removeprefix(b" ")
            else:
                yield self._token_bytes[i]


def unknown_id(token_id: int, vocab_size: int) -> str:
    """The message for an id outside the vocabulary."""
    return (
        f"Token id {token_id} is outside the vocabulary: ids go from 0 to {vocab_size - 1}. "
        "Does this tokenizer belong to the model that made the ids?"
    )


class StopStrings:
    """Finds the first stop string in a stream of text and holds back what may become one.

    The stop that is complete first wins; of two that end together, the longer.
    """

    def __init__(self, stops: Collection[str]) -> None:
        """Raises TokenizerError for an empty stop string, which would match everywhere."""
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise TokenizerError(f"Stop strings must be a list of non-empty texts, but were {stops!r}.")
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None
        self.rest = ""  # what followed the stop string in the text that completed it

    @property
    def is_holding(self) -> bool:
        """Whether text is held back that may become a stop string."""
        return bool(self._held)

    def push(self, text: str) -> str:
        """Add text; return what can be shown. After a match (`matched` is set) nothing more comes."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, start, self.matched = min(found)
            self._held, self.rest = "", text[end:]
            return text[:start]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text that was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
