"""Reads a sentencepiece model file and retypes pieces in it, on the protobuf wire format itself.

Source: sentencepiece/src/sentencepiece_model.proto. Only the fields named below are looked at; every
other byte is carried over as it is, so sentencepiece sees the file that its author wrote.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from internlm2.errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE = 2

_FLOAT = struct.Struct("<f")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Piece(NamedTuple):
    """One entry of the vocabulary. score: merge priority, higher first."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class ModelFile:
    """The parts of a sentencepiece model that decide how text becomes ids."""

    pieces: tuple[Piece, ...]
    model_type: int
    byte_fallback: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    has_normalizer_rules: bool
    encoded_pieces: tuple[bytes, ...]
    rest: bytes  # every top-level field that is not a piece

    def serialize(self, *, changed: Mapping[int, Piece]) -> bytes:
        """The bytes of a model file with some pieces changed, for sentencepiece to load."""
        encoded = list(self.encoded_pieces)
        for i, piece in changed.items():
            encoded[i] = _piece_bytes(piece)
        return b"".join(encoded) + self.rest


def parse(content: bytes, *, where: str) -> ModelFile:
    """Read a model file. `where` names it in messages. Raises TokenizerError when it is damaged."""
    pieces: list[Piece] = []
    encoded: list[bytes] = []
    rest: list[bytes] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value, raw in _fields(content):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
                encoded.append(raw)
                continue
            rest.append(raw)
            if number == 2 and isinstance(value, bytes):
                trainer = {n: v for n, v, _ in _fields(value)}
            elif number == 3 and isinstance(value, bytes):
                normalizer = {n: v for n, v, _ in _fields(value)}
    except (ValueError, IndexError, struct.error) as error:
        raise TokenizerError(damaged(where, str(error))) from error
    if not pieces:
        raise TokenizerError(damaged(where, "it holds no pieces"))
    return ModelFile(
        pieces=tuple(pieces),
        model_type=_integer(trainer.get(3, 1)),
        byte_fallback=bool(trainer.get(35, 0)),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
        has_normalizer_rules=bool(normalizer.get(2, b"")),
        encoded_pieces=tuple(encoded),
        rest=b"".join(rest),
    )


def damaged(where: str, reason: str) -> str:
    """The message for a model file that cannot be read."""
    return f"{where} is not a sentencepiece model, or is damaged ({reason}). Download or copy it again."


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes, bytes]]:
    """Yield (field number, value, raw bytes with the tag) for each field of one message."""
    position, end = 0, len(content)
    while position < end:
        start = position
        if content[position] == 0x0A and content[position + 1] < 0x80:  # field 1 of less than 128 bytes
            position += 2 + content[position + 1]
            if position > end:
                raise ValueError(f"cut off at byte {end}")
            yield 1, content[start + 2 : position], content[start:position]
            continue
        tag, position = _read_varint(content, position)
        kind = tag & 7
        value: int | bytes
        if kind == _VARINT:
            value, position = _read_varint(content, position)
        elif kind == _BYTES:
            size, position = _read_varint(content, position)
            value = content[position : position + size]
            position += size
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
            value = content[position : position + size]
            position += size
        else:
            raise ValueError(f"unknown wire type {kind} at byte {start}")
        if position > end:
            raise ValueError(f"cut off at byte {end}")
        yield tag >> 3, value, content[start:position]


def _read_varint(content: bytes, position: int) -> tuple[int, int]:
    byte = content[position]
    if byte < 0x80:
        return byte, position + 1
    value, shift = byte & 0x7F, 7
    while True:
        position += 1
        byte = content[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position + 1
        shift += 7


def _piece(content: bytes) -> Piece:
    size = content[1]
    if (
        content[0] == 0x0A
        and size < 0x80
        and len(content) in (size + 7, size + 9)
        and content[size + 2] == 0x15
    ):
        # The layout that sentencepiece writes, read at once: a vocabulary has 92,544 of these.
        kind = content[-1] if len(content) == size + 9 else NORMAL
        return Piece(content[2 : size + 2].decode(), _FLOAT.unpack_from(content, size + 3)[0], kind)
    text, score, kind = "", 0.0, NORMAL
    for number, value, _ in _fields(content):
        if number == 1 and isinstance(value, bytes):
            text = value.decode()
        elif number == 2 and isinstance(value, bytes):
            score = _FLOAT.unpack(value)[0]
        elif number == 3:
            kind = _integer(value)
    return Piece(text, score, kind)


def _piece_bytes(piece: Piece) -> bytes:
    text = piece.text.encode()
    body = b"\x0a" + _varint(len(text)) + text + b"\x15" + _FLOAT.pack(piece.score)
    body += b"\x18" + _varint(piece.kind)
    return b"\x0a" + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _integer(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("a number is stored as bytes")
    return value
