"""Tokenizers in GGUF: the same ids after the journey, the right ends, and files of llama.cpp itself."""

import json
import logging
import re
import shutil

import gguf
import numpy as np
import pytest
import sentencepiece
from gguf import TokenType
from small_models import byte_level_folder, chat_tokenizer, random_checkpoint, small_config

from goldens import DATA
from internlm2 import Tokenizer
from internlm2.checkpoint.gguf.read import GGUFCheckpoint
from internlm2.checkpoint.gguf.vocab import NUL_NAME
from internlm2.checkpoint.gguf.write import write_gguf
from internlm2.errors import CheckpointError, ExportError
from internlm2.tokenizer import model_file

LINES = [json.loads(line) for line in (DATA / "tokenizer" / "ids.jsonl").open(encoding="utf-8")]
WIDE = small_config(vocab_size=92544, hidden_size=12, num_hidden_layers=1)


def fields_of(path) -> dict[str, object]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


@pytest.fixture(scope="module")
def chat_gguf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    checkpoint = random_checkpoint(WIDE, tokenizer_folder=chat_tokenizer(folder))
    write_gguf(checkpoint, folder / "model.gguf", dtype="float16")
    return folder / "model.gguf"


@pytest.fixture(scope="module")
def chat_fields(chat_gguf):
    return fields_of(chat_gguf)


def assert_golden_ids(folder) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for line in LINES:
        if "\0" not in line["text"]:
            assert processor.encode(line["text"]) == line["ids"], line["text"]
    assert (processor.bos_id(), processor.eos_id(), processor.unk_id(), processor.pad_id()) == (1, 2, 0, -1)


def test_internlm2_ids_survive_the_journey(chat_gguf):
    checkpoint = GGUFCheckpoint(chat_gguf)
    assert_golden_ids(checkpoint.tokenizer_folder)
    ours = Tokenizer.from_pretrained(checkpoint.tokenizer_folder)
    original = Tokenizer.from_pretrained(chat_gguf.parent / "tokenizer-of-a-chat-model")
    assert ours.stop_ids == original.stop_ids == {2, 92542}
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (original.bos_id, original.eos_id, original.pad_id)
    assert list(ours.token_bytes) == list(original.token_bytes)
    messages = [{"role": "user", "content": "Hi <|im_end|> [UNUSED_TOKEN_146]"}]
    assert ours.apply_chat(messages) == original.apply_chat(messages)
    assert checkpoint.config == WIDE


def test_pieces_are_those_of_the_original_model(chat_gguf):
    folder = GGUFCheckpoint(chat_gguf)
    found = model_file.parse((folder.tokenizer_folder / "tokenizer.model").read_bytes(), where="found")
    original = model_file.parse((DATA / "tokenizer" / "tokenizer.model").read_bytes(), where="original")
    assert [tuple(p) for p in found.pieces] == [tuple(p) for p in original.pieces]


def test_token_types_tell_llama_cpp_what_text_may_not_reach(chat_fields):
    tokens, types = chat_fields["tokenizer.ggml.tokens"], chat_fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(chat_fields["tokenizer.ggml.scores"]) == 92544
    expected = {
        0: TokenType.UNKNOWN,
        1: TokenType.CONTROL,
        3: TokenType.BYTE,
        259: TokenType.NORMAL,
        92395: TokenType.USER_DEFINED,
        92397: TokenType.UNUSED,
        92538: TokenType.CONTROL,
        92543: TokenType.CONTROL,
    }
    assert {i: types[i] for i in expected} == expected
    assert tokens[92537:] == [
        "[UNUSED_TOKEN_140]",
        "<|plugin|>",
        "<|interpreter|>",
        "<|action_end|>",
        "<|action_start|>",
        "<|im_end|>",
        "<|im_start|>",
    ]
    assert chat_fields["tokenizer.ggml.add_space_prefix"] is False
    assert chat_fields["tokenizer.ggml.add_bos_token"] is True


def test_no_merge_of_pieces_makes_the_name_of_nul(chat_fields):
    tokens = set(chat_fields["tokenizer.ggml.tokens"])
    assert chat_fields["tokenizer.ggml.tokens"][354] == NUL_NAME
    assert not any(NUL_NAME[:n] in tokens and NUL_NAME[n:] in tokens for n in range(1, len(NUL_NAME)))


def test_a_chat_model_ends_with_im_end(chat_fields):
    assert chat_fields["tokenizer.ggml.eos_token_id"] == 92542
    assert chat_fields["tokenizer.ggml.eot_token_id"] == 92542
    assert "<|im_start|>" in chat_fields["tokenizer.chat_template"]


def test_a_base_model_ends_with_its_document(tmp_path):
    shutil.copy(DATA / "tokenizer" / "tokenizer.model", tmp_path)
    write_gguf(random_checkpoint(WIDE, tokenizer_folder=tmp_path), tmp_path / "base.gguf", dtype="float16")
    fields = fields_of(tmp_path / "base.gguf")
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.ggml.eot_token_id"] == 92542
    assert "tokenizer.chat_template" not in fields


@pytest.mark.parametrize("where", ["jinja", "named"])
def test_the_folders_own_template_wins(where, tmp_path):
    folder = chat_tokenizer(tmp_path)
    if where == "jinja":
        (folder / "chat_template.jinja").write_text("mine <|im_end|>")
    else:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["chat_template"] = [{"name": "default", "template": "mine <|im_end|>"}]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    write_gguf(random_checkpoint(WIDE, tokenizer_folder=folder), tmp_path / "chat.gguf", dtype="float16")
    assert fields_of(tmp_path / "chat.gguf")["tokenizer.chat_template"] == "mine <|im_end|>"


def rewrite(source, target, change) -> None:
    """Copy a GGUF with other metadata. change: edits the dict of key -> value."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    values = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    del values["general.architecture"]
    change(values)
    for key, value in values.items():
        if key in reader.fields:
            kinds = reader.fields[key].types
            writer.add_key_value(key, value, kinds[0], sub_type=kinds[-1] if len(kinds) > 1 else None)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_of_llama_cpps_own_converter_gives_the_same_ids(chat_gguf, tmp_path):
    """conversion/internlm.py: NUL as a dragon, user-defined as normal, added tokens with score -1000."""

    def as_upstream(values):
        tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
        tokens[354] = "\N{DRAGON}"
        for i in range(92352, 92397):
            types[i] = int(TokenType.NORMAL)
        for i in (0, 1, 2, *range(92538, 92544)):
            types[i] = int(TokenType.CONTROL)
            values["tokenizer.ggml.scores"][i] = -1000.0

    rewrite(chat_gguf, tmp_path / "upstream.gguf", as_upstream)
    checkpoint = GGUFCheckpoint(tmp_path / "upstream.gguf")
    assert_golden_ids(checkpoint.tokenizer_folder)
    assert Tokenizer.from_pretrained(checkpoint.tokenizer_folder).stop_ids == {2, 92542}
    assert checkpoint.config.eos_token_id == 2


@pytest.fixture
def small_vocabulary(tmp_path):
    """A sentencepiece vocabulary of ten pieces in a GGUF."""
    config = small_config(vocab_size=10, num_hidden_layers=1)
    write_gguf(random_checkpoint(config), tmp_path / "none.gguf", dtype="float32")

    def add(values):
        values["tokenizer.ggml.model"] = "llama"
        values["tokenizer.ggml.tokens"] = ["<unk>", "<s>", "</s>", *"abcd", "ab", "cd", "abcd"]
        values["tokenizer.ggml.scores"] = [0.0, 0.0, 0.0, -5.0, -6.0, -7.0, -8.0, -1.0, -2.0, -3.0]
        values["tokenizer.ggml.token_type"] = [2, 3, 3, *[1] * 7]
        values["tokenizer.ggml.unknown_token_id"] = 0

    rewrite(tmp_path / "none.gguf", tmp_path / "small.gguf", add)
    return tmp_path / "small.gguf"


def test_other_sentencepiece_vocabularies_are_rebuilt_too(small_vocabulary):
    """Without add_space_prefix in the file a space comes first, as in Llama 2."""
    checkpoint = GGUFCheckpoint(small_vocabulary)
    model = str(checkpoint.tokenizer_folder / "tokenizer.model")
    assert sentencepiece.SentencePieceProcessor(model_file=model).encode("abcd") == [0, 9]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["tokenizer.ggml.token_type"].pop(), "10 tokens, but 9 token types"),
        (lambda v: v["tokenizer.ggml.scores"].pop(), "10 tokens, but 9 scores"),
        (lambda v: v.update({"tokenizer.ggml.padding_token_id": 99}), "padding token has id 99"),
        (lambda v: v.update({"tokenizer.ggml.bos_token_id": 99}), "bos token has id 99"),
        (lambda v: v.update({"tokenizer.ggml.eos_token_id": 99}), "eos token has id 99"),
        (lambda v: v.update({"tokenizer.ggml.unknown_token_id": 99}), "unknown token has id 99"),
        (
            lambda v: v.update({"tokenizer.ggml.merges": [1, 2], "tokenizer.ggml.model": "gpt2"}),
            "list of texts",
        ),
    ],
)
def test_vocabularies_that_do_not_fit_are_refused(change, message, small_vocabulary, tmp_path):
    rewrite(small_vocabulary, tmp_path / "bad.gguf", change)
    with pytest.raises(CheckpointError, match=message):
        GGUFCheckpoint(tmp_path / "bad.gguf")


@pytest.mark.parametrize(("kind", "message"), [("t5", "'t5' are not supported"), ("gpt2", "'default'|merge")])
def test_an_unusable_tokenizer_is_told_and_the_weights_stay_usable(
    kind, message, small_vocabulary, tmp_path, caplog
):
    def change(values):
        values["tokenizer.ggml.model"] = kind
        values["tokenizer.ggml.merges"] = ["x y"]

    rewrite(small_vocabulary, tmp_path / "other.gguf", change)
    with caplog.at_level(logging.WARNING, logger="internlm2"):
        checkpoint = GGUFCheckpoint(tmp_path / "other.gguf")
    assert checkpoint.tokenizer_folder is None
    assert "the weights can be used, but not the tokenizer" in caplog.text
    assert re.search(message, caplog.text)
    assert checkpoint.read("model.norm.weight").shape == (48,)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    checkpoint = random_checkpoint(small_config(), tokenizer_folder=chat_tokenizer(tmp_path))
    with pytest.raises(ExportError, match="92544 tokens, but the model has 90 rows"):
        write_gguf(checkpoint, tmp_path / "model.gguf", dtype="float16")
    assert not (tmp_path / "model.gguf").exists()


def test_rows_without_a_token_get_a_name(tmp_path):
    checkpoint = random_checkpoint(small_config(vocab_size=260), tokenizer_folder=byte_level_folder(tmp_path))
    write_gguf(checkpoint, tmp_path / "m.gguf", dtype="float16")
    fields = fields_of(tmp_path / "m.gguf")
    assert fields["tokenizer.ggml.tokens"][-1] == "[PAD259]"
    assert fields["tokenizer.ggml.token_type"][-1] == TokenType.UNUSED
    assert GGUFCheckpoint(tmp_path / "m.gguf").config.vocab_size == 260


UNKNOWN_PRE = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def test_byte_level_vocabularies_survive_and_their_pre_tokenizer_is_recognised(tmp_path):
    folder = byte_level_folder(tmp_path)
    config = small_config(vocab_size=258, bos_token_id=None, eos_token_id=257, pad_token_id=257)
    write_gguf(random_checkpoint(config, tokenizer_folder=folder), tmp_path / "m.gguf", dtype="float32")
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    assert fields_of(tmp_path / "m.gguf")["tokenizer.ggml.pre"] == "smollm"
    assert checkpoint.config == config
    ours, original = Tokenizer.from_pretrained(checkpoint.tokenizer_folder), Tokenizer.from_pretrained(folder)
    for text in ("abba 123 \n\N{GRINNING FACE}", "<|im_end|>ab"):
        assert ours.encode(text) == original.encode(text)
        assert ours.encode(text, allow_special=True) == original.encode(text, allow_special=True)
    assert ours.stop_ids == original.stop_ids == {257}


def test_a_stated_pre_tokenizer_name_is_used(tmp_path):
    folder = byte_level_folder(tmp_path, pre_tokenizer=UNKNOWN_PRE, gguf_pre="olmo")
    checkpoint = random_checkpoint(small_config(vocab_size=258), tokenizer_folder=folder)
    write_gguf(checkpoint, tmp_path / "m.gguf", dtype="float32")
    assert fields_of(tmp_path / "m.gguf")["tokenizer.ggml.pre"] == "olmo"


def test_an_unknown_pre_tokenizer_is_refused(tmp_path):
    folder = byte_level_folder(tmp_path, pre_tokenizer=UNKNOWN_PRE)
    checkpoint = random_checkpoint(small_config(vocab_size=258), tokenizer_folder=folder)
    with pytest.raises(ExportError, match='Add it as "gguf_pre"'):
        write_gguf(checkpoint, tmp_path / "m.gguf", dtype="float32")


def test_a_tokenizer_json_that_is_not_byte_level_is_refused(tmp_path):
    from internlm2.tokenizer.export import save_tokenizer

    folder = tmp_path / "folder"
    folder.mkdir()
    save_tokenizer(Tokenizer.from_pretrained(chat_tokenizer(tmp_path)), folder, for_transformers=True)
    with pytest.raises(ExportError, match=r"no byte-level BPE.*tokenizer\.model"):
        write_gguf(random_checkpoint(WIDE, tokenizer_folder=folder), tmp_path / "m.gguf", dtype="float32")
