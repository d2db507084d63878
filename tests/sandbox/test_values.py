"""Plain values survive the wire exactly; anything else is a handle or an error."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2.sandbox import wire
from internlm2.sandbox.inside.values import MAX_DEPTH, CannotSendError, decode, encode

hashable = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=8,
)
plain = st.recursive(
    hashable,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(hashable, inner, max_size=4)
        | st.tuples(inner)
        | st.sets(hashable, max_size=3)
    ),
    max_leaves=12,
)


def refuse(value: object) -> None:
    raise CannotSendError(f"refused {type(value).__name__}")


def same(left: object, right: object) -> bool:
    return (
        type(left) is type(right) and repr(left) == repr(right) if isinstance(left, float) else left == right
    )


@settings(max_examples=60, deadline=None)
@given(plain)
def test_every_plain_value_comes_back_equal_and_of_its_kind(value: object) -> None:
    text = json.dumps(encode(value, handle=refuse))
    back = decode(json.loads(text), handle=refuse)
    assert same(back, value)
    assert type(back) is type(value)


def test_other_kinds_become_handles() -> None:
    class Number(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    for value in (Number(4), object(), len, Number):
        with pytest.raises(CannotSendError, match="refused"):
            encode([value], handle=refuse)


def test_values_that_are_endless_or_too_deep_are_refused() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(CannotSendError, match=f"nested more than {MAX_DEPTH} deep"):
        encode(loop, handle=refuse)
    with pytest.raises(CannotSendError, match="more than 100,000 items"):
        encode((n for n in iter(int, 1)), handle=refuse)


@pytest.mark.parametrize("data", [{}, {"a": 1, "b": 2}])
def test_data_with_no_single_tag_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match="one is allowed"):
        decode(data, handle=refuse)


def test_an_unknown_tag_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown tag 'eval'"):
        decode([{"eval": "1"}], handle=refuse)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.dictionaries(st.text(), st.integers(), max_size=3), max_size=4), st.integers(1, 7))
def test_messages_are_found_however_the_bytes_are_cut(messages: list[dict[str, object]], size: int) -> None:
    data = b"".join(wire.pack(message) for message in messages)
    inbox = wire.Inbox()
    found = [m for start in range(0, len(data), size) for m in inbox.feed(data[start : start + size])]
    assert found == messages


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\xff\xff\xff", "was announced; 33,554,432 are allowed"),
        (b"\0\0\0\x02[]", "not an object but list"),
        (b"\0\0\0\x01{", "is not JSON"),
        ((20_000).to_bytes(4, "big") + b"[" * 20_000, "is not JSON"),
    ],
)
def test_what_is_no_message_is_refused_by_both_readers(data: bytes, words: str) -> None:
    with pytest.raises(wire.WireError, match=words):
        wire.Inbox().feed(data)
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    with pytest.raises(wire.WireError, match=words):
        wire.receive(reading)
    os.close(reading)


def test_a_closed_pipe_reads_as_none() -> None:
    for data in (b"", b"\0\0", b"\0\0\0\x09{}"):
        reading, writing = os.pipe()
        os.write(writing, data)
        os.close(writing)
        assert wire.receive(reading) is None
        os.close(reading)


def test_a_message_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(wire.WireError, match="33,554,432 are allowed"):
        wire.pack({"x": "y" * wire.MAX_MESSAGE_BYTES})
