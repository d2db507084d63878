"""Text to ids with sentencepiece: the truth for InternLM2.

The released model types `[UNUSED_TOKEN_n]` as user-defined, so raw sentencepiece turns a user's text
`[UNUSED_TOKEN_146]` into the control token of a turn. We retype those pieces to CONTROL in memory, which
sentencepiece never matches in text: nothing has to be searched for or escaped, and no other id changes.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

import sentencepiece

from internlm2.errors import TokenizerError
from internlm2.tokenizer import model_file
from internlm2.tokenizer.cut import Cuts
from internlm2.tokenizer.model_file import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Piece
from internlm2.tokenizer.special import MARKER

# sentencepiece warns on stderr about a NUL piece under byte fallback and then never uses it.
_NUL_SLOT = "[NUL]"


class SentencePieceBackend:
    """A sentencepiece model with its markers made unreachable from text."""

    def __init__(self, content: bytes, *, where: str) -> None:
        """content: the bytes of `tokenizer.model`; where: its name in messages."""
        self.content = content
        self.model = model_file.parse(content, where=where)
        self.special_ids = frozenset(i for i, piece in enumerate(self.model.pieces) if _is_special(piece))
        self.drops_leading_space = self.model.add_dummy_prefix
        changed: dict[int, Piece] = {}
        for i, piece in enumerate(self.model.pieces):
            if _is_reachable_marker(piece):
                changed[i] = piece._replace(kind=CONTROL)
            elif piece.text == "\0":
                changed[i] = piece._replace(kind=CONTROL, text=_NUL_SLOT)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self.model.serialize(changed=changed))
        except RuntimeError as error:
            raise TokenizerError(model_file.damaged(where, str(error))) from error

    @classmethod
    def from_file(cls, path: Path) -> "SentencePieceBackend":
        """Read `tokenizer.model`. Raises TokenizerError when it cannot be read or is damaged."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise TokenizerError(
                f"Cannot read {path}: {error.strerror}. Check the file and its rights."
            ) from error
        return cls(content, where=str(path))

    @property
    def bos_id(self) -> int | None:
        """The id that starts a sequence, or None."""
        return _id_or_none(self._processor.bos_id())

    @property
    def eos_id(self) -> int | None:
        """The id that ends a sequence, or None."""
        return _id_or_none(self._processor.eos_id())

    @property
    def pad_id(self) -> int | None:
        """The id that fills up a batch, or None."""
        return _id_or_none(self._processor.pad_id())

    @cached_property
    def tokens(self) -> list[str]:
        """The name of every piece."""
        return [piece.text for piece in self.model.pieces]

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of every piece; U+2581 is a space."""
        space = "\u2581" if self.model.escape_whitespaces else " "
        return [
            bytes([int(piece.text[1:-1], 16)])
            if piece.kind == BYTE
            else (piece.text if piece.kind in (CONTROL, UNKNOWN) else piece.text.replace(space, " ")).encode()
            for piece in self.model.pieces
        ]

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text`, equal to those of raw sentencepiece."""
        cuts = self._cuts
        if cuts is None or len(text) <= cuts.max_whole_characters:
            return self._processor.encode(text)
        # NOTE: one call with the list of blocks costs more than one call per block: it starts a thread pool.
        ids: list[int] = []
        for block in cuts.blocks(text):
            ids += self._processor.encode(block)
        return ids

    def encode_batch(self, texts: Sequence[str], num_threads: int) -> list[list[int]]:
        """Ids of every text, over the threads of sentencepiece; a long text is spread over them too."""
        cuts = self._cuts
        if cuts is None or max(map(len, texts), default=0) <= cuts.max_whole_characters:
            return self._processor.encode(list(texts), num_threads=num_threads)
        blocks = [cuts.blocks(text) for text in texts]
        parts = iter(self._processor.encode(list(chain.from_iterable(blocks)), num_threads=num_threads))
        results = []
        for own in blocks:
            ids = next(parts)
            for _ in range(len(own) - 1):
                ids += next(parts)
            results.append(ids)
        return results

    @cached_property
    def _cuts(self) -> Cuts | None:
        """Where text may be cut, or None when the normaliser looks across cuts.

        NOTE: without byte fallback sentencepiece joins neighbouring unknown characters into one id.
        """
        model = self.model
        if (
            model.model_type != model_file.BPE
            or not model.byte_fallback
            or model.add_dummy_prefix
            or model.remove_extra_whitespaces
            or model.has_normalizer_rules
            or not model.escape_whitespaces
        ):
            return None
        pieces = (
            piece.text.replace("\u2581", " ")
            for i, piece in enumerate(model.pieces)
            if piece.kind in (NORMAL, USER_DEFINED, UNUSED) and i not in self.special_ids
        )
        return Cuts(pieces)


def _is_special(piece: Piece) -> bool:
    return piece.kind in (CONTROL, UNKNOWN) or _is_reachable_marker(piece)


def _is_reachable_marker(piece: Piece) -> bool:
    return piece.kind == USER_DEFINED and MARKER.fullmatch(piece.text) is not None


def _id_or_none(piece_id: int) -> int | None:
    return piece_id if piece_id >= 0 else None
