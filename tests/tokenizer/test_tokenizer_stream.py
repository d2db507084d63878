"""Streaming gives the text of decoding at once, however it is split, and never half a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm2.errors import TokenizerError
from internlm2.tokenizer import StopStrings

TEXTS = st.text(st.characters(codec="utf-8"), max_size=60)


def splits(draw_from: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, draw_from), max_size=60)


def parts(items, sizes):
    position = 0
    for size in sizes:
        yield items[position : position + size]
        position += size
    yield items[position:]


@given(ids=st.lists(st.integers(0, 92543), max_size=60), sizes=splits(5), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_splitting_of_any_ids_gives_the_text_of_decode(tok, ids, sizes, skip):
    stream = tok.stream(skip_special=skip)
    shown = [stream.push(part) for part in parts(ids, sizes)] + [stream.finish()]
    assert "".join(shown) == tok.decode(ids, skip_special=skip)
    table = [b"" if skip and i in tok.specials.names else tok.token_bytes[i] for i in ids]
    assert "".join(shown) == b"".join(table).decode(errors="replace")


@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_no_half_character_is_ever_shown(tok, byte_level, text):
    for tokenizer in (tok, byte_level):
        stream, shown = tokenizer.stream(), ""
        for i in tokenizer.encode(text):
            shown += stream.push(i)
            assert text.replace("▁", " " if tokenizer is tok else "▁").startswith(shown)
        assert stream.finish() == ""
        assert shown == tokenizer.decode(tokenizer.encode(text))


def test_a_character_over_four_ids_comes_out_once_it_is_whole(tok):
    stream = tok.stream()
    assert [stream.push(i) for i in tok.encode("😀")] == ["", "", "", "😀"]


def test_what_never_becomes_a_character_comes_out_at_the_end(tok):
    stream = tok.stream()
    assert stream.push([243, 162]) == ""
    assert stream.finish() == "\ufffd"


@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    sizes=splits(4),
)
@settings(max_examples=500, deadline=None)
def test_stop_strings_do_not_depend_on_the_splitting(text, stops, sizes):
    stop = StopStrings(stops)
    shown = "".join(stop.push(part) for part in parts(text, sizes)) + stop.finish()
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    if ends:
        _, start, first = min(ends)
        assert (shown, stop.matched) == (text[:start], first)
    else:
        assert (shown, stop.matched) == (text, None)


def test_stop_strings_hold_back_only_what_may_become_one():
    stop = StopStrings(["###", "\nUser"])
    assert stop.push("Hello #") == "Hello "
    assert stop.push("1\n") == "#1"
    assert stop.push("Use the source") == "\nUse the source"
    assert stop.push(" ##") == " "
    assert stop.push("#tail") == ""
    assert (stop.matched, stop.rest) == ("###", "tail")
    assert stop.push("more") == ""


@pytest.mark.parametrize("stops", [[""], ["a", ""], "abc", [1]])
def test_stop_strings_that_make_no_sense_are_refused(stops):
    with pytest.raises(TokenizerError, match="Stop strings must be a list of non-empty texts"):
        StopStrings(stops)
