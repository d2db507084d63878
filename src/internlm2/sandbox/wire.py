"""Messages between processes: four bytes of length, then one JSON object. Never pickle.

Every reader states the longest message it takes, so a hostile writer cannot fill the reader's memory.
"""

import json
import os

MAX_MESSAGE_BYTES = 32 << 20
_HEAD_BYTES = 4


class WireError(Exception):
    """The other side sent something that is not a message, or one that is too long."""


def pack(message: dict[str, object]) -> bytes:
    """One message as bytes. Raises WireError when it is longer than MAX_MESSAGE_BYTES."""
    body = json.dumps(message).encode("ascii")
    if len(body) > MAX_MESSAGE_BYTES:
        raise WireError(f"The message has {len(body):,} bytes; {MAX_MESSAGE_BYTES:,} are allowed.")
    return len(body).to_bytes(_HEAD_BYTES, "big") + body


def send(descriptor: int, message: dict[str, object]) -> None:
    """Write one message to a blocking pipe."""
    view = memoryview(pack(message))
    while view:
        view = view[os.write(descriptor, view) :]


def receive(descriptor: int) -> dict[str, object] | None:
    """Read one message from a blocking pipe, and not a byte more; None when the other side has closed it."""
    head = _read_exactly(descriptor, _HEAD_BYTES)
    if head is None:
        return None
    body = _read_exactly(descriptor, _length(head))
    return None if body is None else _parse(body)


def _read_exactly(descriptor: int, num_bytes: int) -> bytes | None:
    parts: list[bytes] = []
    while num_bytes:
        part = os.read(descriptor, min(num_bytes, 1 << 20))
        if not part:
            return None
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def _length(head: bytes) -> int:
    length = int.from_bytes(head, "big")
    if length > MAX_MESSAGE_BYTES:
        raise WireError(f"A message of {length:,} bytes was announced; {MAX_MESSAGE_BYTES:,} are allowed.")
    return length


def _parse(body: bytes) -> dict[str, object]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError(f"A message is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise WireError(f"A message is not an object but {type(message).__name__}.")
    return message


class Inbox:
    """Collects the bytes of a pipe that is read without blocking, and gives whole messages."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[dict[str, object]]:
        """Add what was read; returns the messages that are complete now. Raises WireError."""
        self._bytes += data
        messages: list[dict[str, object]] = []
        while len(self._bytes) >= _HEAD_BYTES:
            end = _HEAD_BYTES + _length(bytes(self._bytes[:_HEAD_BYTES]))
            if len(self._bytes) < end:
                break
            messages.append(_parse(bytes(self._bytes[_HEAD_BYTES:end])))
            del self._bytes[:end]
        return messages
