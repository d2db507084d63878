"""Folders as they are found in the wild: old spellings, misplaced ids, missing and damaged files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from vocabularies import DATA, byte_level_folder, tiny_model

from internlm2 import Tokenizer
from internlm2.errors import TokenizerError
from internlm2.tokenizer import model_file
from internlm2.tokenizer.tokenizers_backend import TokenizersBackend


def official(folder: Path, config: dict) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes((DATA / "tokenizer.model").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": {"92543": {"content": "[UNUSED_TOKEN_146]"}}, "eos_token": "</s>"},
        {"added_tokens_decoder": {"92543": {"content": "<|im_start|>"}, "92542": {"content": "<|im_end|>"}}},
        {"added_tokens_decoder": {"92549": {"content": "<|im_start|>"}, "92548": {"content": "<|im_end|>"}}},
        {"bos_token": {"content": "<s>"}, "pad_token": "</s>", "eos_token": {"content": "</s>"}},
    ],
)
def test_folders_of_every_age_have_the_same_markers(tmp_path, config):
    tokenizer = official(tmp_path, config)
    assert tokenizer.special_tokens["<|im_start|>"] == 92543
    assert tokenizer.stop_ids == frozenset({2, 92542})
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.pad_id) == (92544, 1, 2)


def test_tokens_added_beyond_the_vocabulary_are_special(tmp_path):
    tokenizer = official(tmp_path, {"added_tokens_decoder": {"92546": {"content": "<img>"}}})
    assert tokenizer.encode("<img>", allow_special=True) == [92546]
    assert 92546 not in tokenizer.encode("<img>")
    assert tokenizer.decode([92546]) == tokenizer.id_to_token(92546) == "<img>"
    assert tokenizer.vocab_size == 92547
    assert tokenizer.decode([92545]) == tokenizer.id_to_token(92545) == ""


def test_sentencepiece_is_preferred_when_both_files_are_there(tmp_path):
    byte_level_folder(tmp_path)
    assert official(tmp_path, {}).vocab_size == 92544


def test_byte_level_markers_are_plain_text_even_when_the_file_does_not_call_them_special(byte_level):
    text = "a <tool_call> <|im_start|> b"
    assert byte_level.decode(byte_level.encode(text)) == text
    assert not set(byte_level.encode(text)) & set(byte_level.special_tokens.values())
    assert byte_level.encode("<tool_call>", allow_special=True) == [byte_level.token_to_id("<tool_call>")]
    assert byte_level.stop_ids == frozenset({0, 2})
    assert byte_level.encode("hello 12", bos=True) == byte_level.encode("hello 12")


def test_a_start_token_that_the_file_adds_itself_comes_once(from_json, exported, tmp_path):
    assert from_json.bos_id == 1
    assert from_json.encode("Hello", bos=True) == [1, 9843]
    assert from_json.encode("Hello") == [9843]
    (tmp_path / "tokenizer.json").write_bytes((exported / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert Tokenizer.from_pretrained(tmp_path).bos_id is None


def test_add_bos_token_is_honoured_where_the_file_adds_none(tmp_path):
    folder = byte_level_folder(tmp_path, add_bos_token=True, bos_token="<|endoftext|>")
    assert Tokenizer.from_pretrained(folder).bos_id == 0


def test_a_file_that_asks_for_cut_or_padded_results_does_not_get_them(byte_level):
    data = json.loads(byte_level.backend.content)
    data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    backend = TokenizersBackend(json.dumps(data), where="test")
    assert backend.encode_ordinary("hello " * 9) == byte_level.encode("hello " * 9)


def test_absent_files_are_named(tmp_path):
    with pytest.raises(
        TokenizerError, match=r"holds neither. Looked for tokenizer.model .* and tokenizer.json"
    ):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match="no_such_folder is no folder"):
        Tokenizer.from_pretrained(str(tmp_path / "no_such_folder"))


@pytest.mark.parametrize(
    "content",
    [b"", b"version https://git-lfs.github.com/spec/v1\n", (DATA / "tokenizer.model").read_bytes()[:700_001]],
)
def test_a_damaged_sentencepiece_model_is_named(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer.model is not a sentencepiece model, or is damaged"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {}}', b"\xff\xfe"])
def test_a_damaged_tokenizer_json_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer.json is not a tokenizer.json, or is damaged"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"added_tokens_decoder": {"x": {}}}'])
def test_a_damaged_configuration_is_named(tmp_path, content):
    byte_level_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"Cannot read .*tokenizer_config.json"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(TokenizerError, match=f"Cannot read .*{name}: Is a directory"):
        Tokenizer.from_pretrained(tmp_path)


def test_an_unknown_decoder_is_refused(byte_level):
    data = json.loads(byte_level.backend.content)
    data["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(TokenizerError, match="has the decoder WordPiece, which this package cannot undo"):
        TokenizersBackend(json.dumps(data), where="test")


def test_an_edited_model_file_keeps_every_other_byte():
    content = (DATA / "tokenizer.model").read_bytes()
    model = model_file.parse(content, where="test")
    assert model.serialize(changed={}) == content
    edited = model_file.parse(
        model.serialize(changed={9: model.pieces[9]._replace(kind=model_file.CONTROL, text="é" * 90)}),
        where="test",
    )
    assert edited.pieces[9] == ("é" * 90, model.pieces[9].score, model_file.CONTROL)
    assert edited.pieces[:9] + edited.pieces[10:] == model.pieces[:9] + model.pieces[10:]
    assert edited.rest == model.rest


def test_the_options_of_a_model_file_are_read():
    tiny = model_file.parse(tiny_model(), where="test")
    assert (tiny.model_type, tiny.byte_fallback, tiny.add_dummy_prefix) == (model_file.BPE, True, True)
    real = model_file.parse((DATA / "tokenizer.model").read_bytes(), where="test")
    assert (real.add_dummy_prefix, real.remove_extra_whitespaces, real.has_normalizer_rules) == (False,) * 3


def test_the_tokenizer_imports_no_torch():
    code = "import sys, internlm2; internlm2.Tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
