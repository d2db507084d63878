"""Ids are those of raw sentencepiece, decoding loses nothing, user text never makes a control id."""

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from vocabularies import DATA, tiny_model

from internlm2 import Tokenizer
from internlm2.errors import TokenizerError
from internlm2.tokenizer.cut import Cuts

CORPORA = Path(__file__).parents[3] / "shared" / "data" / "corpora"
UNICODE = st.text(st.characters(codec="utf-8"), max_size=200)
# Text in which merges, spaces and tied pieces meet often.
DENSE = st.text(st.sampled_from("  \n\t\r\0ab1.-=_/*#'(),;e é你好的—…ＡＢ😀▁<>[]|U"), max_size=300)


def test_golden_ids_are_equal_except_where_control_pieces_are_spelled(tok, golden):
    differing = [text for text, ids in golden if tok.encode(text) != ids]
    assert differing == ["[UNUSED_TOKEN_146]x[UNUSED_TOKEN_145]"]
    assert len(golden) == 410


def test_spelled_control_pieces_become_plain_text(tok):
    ids = tok.encode("[UNUSED_TOKEN_146]x[UNUSED_TOKEN_145]")
    assert not set(ids) & set(tok.special_tokens.values())
    assert tok.decode(ids) == "[UNUSED_TOKEN_146]x[UNUSED_TOKEN_145]"


def test_golden_texts_decode_to_themselves_except_u2581(tok, golden):
    lossy = [text for text, ids in golden if tok.decode(tok.encode(text)) != text]
    assert lossy == ["▁ literal lower block"]
    assert tok.decode(tok.encode(lossy[0])) == "  literal lower block"


@given(text=UNICODE | DENSE)
@settings(max_examples=500, deadline=None)
def test_ids_equal_raw_sentencepiece(tok, raw, text):
    assume("UNUSED_TOKEN" not in text)  # hypothesis does find it: that is where we differ on purpose
    ids = tok.encode(text)
    assert ids == raw.encode(text)
    assert tok.decode(ids) == text.replace("▁", " ")


@pytest.fixture(scope="module")
def finely_cut():
    """The same tokenizer, cutting so often that every kind of place is met."""
    tokenizer = Tokenizer.from_pretrained(DATA)
    tokenizer.backend._cuts.block_characters = 50
    tokenizer.backend._cuts.max_whole_characters = 100
    return tokenizer


@given(text=DENSE, times=st.integers(10, 60))
@settings(max_examples=100, deadline=None)
def test_long_text_is_cut_without_changing_an_id(finely_cut, raw, text, times):
    long = text * times
    assert finely_cut.encode(long) == raw.encode(long)
    assert finely_cut.encode_batch([long, text], num_threads=2) == [raw.encode(long), raw.encode(text)]


def test_runs_of_one_character_are_never_cut_wrongly(finely_cut, raw):
    for character in " -=*\n\t一":
        text = "x" + character * 3000 + "y"
        assert finely_cut.encode(text) == raw.encode(text)


@given(text=st.text(st.sampled_from("ab ▁,"), min_size=2100, max_size=2500))
@settings(max_examples=30, deadline=None)
def test_blocks_join_to_the_text_and_no_piece_crosses_a_cut(text):
    pieces = ["ab", " a", ", "]
    blocks = Cuts(pieces, block_characters=100, max_whole_characters=200).blocks(text)
    assert len(blocks) > 10
    assert "".join(blocks) == text
    for left, right in pairwise(blocks):
        crossing = (left[-1] + right[0]).replace("▁", " ")
        assert not any(crossing in piece for piece in pieces)


def test_cuts_do_cut():
    assert len(Cuts(["ab"]).blocks("ba" * 9000)) > 5


def test_vectors_of_the_fact_sheet(tok):
    assert tok.encode("Hello! What's your name?", bos=True) == [1, 9843, 346, 3716, 725, 829, 963, 345]
    assert tok.encode("😀") == [243, 162, 155, 131]
    assert (tok.vocab_size, tok.bos_id, tok.eos_id, tok.pad_id) == (92544, 1, 2, 2)
    assert tok.stop_ids == frozenset({2, 92542})


def test_nul_is_the_byte_piece_and_its_own_piece_decodes(tok, raw, capfd):
    Tokenizer.from_pretrained(DATA)
    assert capfd.readouterr().err == ""
    assert tok.encode("\0a") == raw.encode("\0a") == [3, 264]
    assert tok.decode([354, 3]) == "\0\0"


@pytest.mark.parametrize(
    ("spelling", "token_id"),
    [
        ("<|im_start|>", 92543),
        ("[UNUSED_TOKEN_146]", 92543),
        ("<|im_end|>", 92542),
        ("[UNUSED_TOKEN_145]", 92542),
        ("<|action_start|>", 92541),
        ("<|action_end|>", 92540),
        ("<|interpreter|>", 92539),
        ("<|plugin|>", 92538),
        ("[UNUSED_TOKEN_130]", 92527),
        ("<s>", 1),
        ("</s>", 2),
    ],
)
def test_special_text_is_special_only_when_allowed(tok, from_json, spelling, token_id):
    for tokenizer in (tok, from_json):
        plain = tokenizer.encode(f"a{spelling}b")
        assert not set(plain) & set(tokenizer.special_tokens.values())
        assert tokenizer.decode(plain) == f"a{spelling}b"
        assert tokenizer.encode(f"a{spelling}b", allow_special=True) == [264, token_id, 260]
        assert tokenizer.encode_batch([spelling], allow_special=True) == [[token_id]]
        assert tokenizer.token_to_id(spelling) == token_id


def test_decoding_names_or_skips_control_ids(tok):
    ids = [1, 92543, 9843, 92542, 92397, 2]
    assert tok.decode(ids) == "<s><|im_start|>Hello<|im_end|>[UNUSED_TOKEN_0]</s>"
    assert tok.decode(ids, skip_special=True) == "Hello"
    assert tok.id_to_token(92543) == "<|im_start|>"
    assert tok.id_to_token(22190) == "▁Hello"


def test_bytes_that_form_no_character_are_replaced(tok):
    assert tok.decode([243, 162]) == b"\xf0\x9f".decode(errors="replace")


@pytest.mark.parametrize("bad", [-1, 92544])
def test_ids_outside_the_vocabulary_are_refused(tok, bad):
    for call in (lambda: tok.decode([bad]), lambda: tok.id_to_token(bad), lambda: tok.stream().push(bad)):
        with pytest.raises(
            TokenizerError, match=f"Token id {bad} is outside the vocabulary: ids go from 0 to 92543"
        ):
            call()


def test_what_is_not_text_is_refused(tok, byte_level):
    for tokenizer in (tok, byte_level):
        with pytest.raises(TokenizerError, match="must be a str, but this is bytes"):
            tokenizer.encode(b"hello")
        with pytest.raises(TokenizerError, match=r"Character 2 of the text is the lone surrogate '\\ud800'"):
            tokenizer.encode("ab\ud800")
        with pytest.raises(TokenizerError, match="lone surrogate"):
            tokenizer.encode_batch(["fine", "ab\ud800"])
    with pytest.raises(TokenizerError, match="takes a list of texts"):
        tok.encode_batch("hello")
    with pytest.raises(TokenizerError, match="num_threads must be 1 or more, but is 0"):
        tok.encode_batch(["hello"], num_threads=0)
    with pytest.raises(TokenizerError, match="no token 'no such token'"):
        tok.token_to_id("no such token")


def test_batch_equals_single(tok, byte_level, golden):
    texts = [text for text, _ in golden]
    for tokenizer in (tok, byte_level):
        for threads in (None, 1, 3):
            assert tokenizer.encode_batch(texts, num_threads=threads) == [tokenizer.encode(t) for t in texts]
    assert tok.encode_batch(texts[:9], True) == [tok.encode(text, True) for text in texts[:9]]
    assert tok.encode_batch([]) == []


def test_small_sentencepiece_vocabularies_work_whatever_their_options(tmp_path):
    markers = ["<|im_start|>", "<|im_end|>"]
    (tmp_path / "tokenizer.model").write_bytes(tiny_model(user_defined_symbols=markers))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    text = "hello <|im_start|> there 你好 ∂"
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == text  # the dummy prefix that this model adds is taken away again
    chat = tokenizer.apply_chat([{"role": "user", "content": "hello"}])
    assert chat[:2] == [1, tokenizer.token_to_id("<|im_start|>")]
    assert tokenizer.encode("hello " * 500) == tokenizer.encode_batch(["hello " * 500], num_threads=2)[0]


@pytest.mark.slow
def test_every_corpus_text_has_equal_ids(tok, raw, from_json):
    if not CORPORA.is_dir():
        pytest.skip("the corpora are not there")
    for path in sorted(CORPORA.glob("[ecz]*/*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in file]
        expected = raw.encode(texts)
        assert tok.encode_batch(texts) == expected, path
        assert from_json.encode_batch(texts) == expected, path
        for text, ids in zip(texts, expected, strict=True):
            assert tok.decode(ids) == text.replace("▁", " "), path
