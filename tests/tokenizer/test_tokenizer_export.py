"""The exported tokenizer.json gives the same ids, also to transformers with none of our code loaded."""

import itertools
import json
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import tiny_model

from internlm2 import Tokenizer
from internlm2.errors import ExportError, TokenizerError
from internlm2.tokenizer import export
from internlm2.tokenizer.bpe_json import rank_merges
from internlm2.tokenizer.model_file import NORMAL

DENSE = st.text(st.sampled_from("  \n\t\r\0ab1.-=_/*#'(),;e é你好的—…ＡＢ😀▁<>[]|U"), max_size=300)


def test_golden_ids_and_texts_through_the_exported_file(from_json, golden):
    differing = [text for text, ids in golden if from_json.encode(text) != ids]
    assert differing == ["[UNUSED_TOKEN_146]x[UNUSED_TOKEN_145]"]
    lossy = [text for text, _ in golden if from_json.decode(from_json.encode(text)) != text]
    assert lossy == ["▁ literal lower block"]


@given(text=st.text(st.characters(codec="utf-8"), max_size=200) | DENSE)
@settings(max_examples=500, deadline=None)
def test_any_text_has_equal_ids(tok, from_json, text):
    assert from_json.encode(text) == tok.encode(text)


@pytest.fixture(scope="module")
def library(exported):
    return tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))


@given(ids=st.lists(st.integers(0, 92543), max_size=40), skip=st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_ids_decode_equally(tok, from_json, library, ids, skip):
    assert from_json.decode(ids, skip_special=skip) == tok.decode(ids, skip_special=skip)
    # Spare slots are no special tokens to other programs, and they replace broken bytes in their own way.
    if not any(92397 <= i < 92538 for i in ids) and "\ufffd" not in tok.decode(ids):
        assert library.decode(ids, skip_special_tokens=skip) == tok.decode(ids, skip_special=skip)


def test_pieces_of_equal_score_merge_in_the_same_order(tok, from_json):
    """Every tied group whose order is not settled by overlap: all triples of its parts, side by side."""
    scores = {p.text: p.score for p in tok.backend.model.pieces if p.kind == NORMAL and p.text != "\0"}
    groups = rank_merges(scores).unordered
    assert len(groups) == 266
    texts = [
        "".join(parts).replace("▁", " ")
        for group in groups
        for parts in itertools.product(sorted({x for pair in group for x in pair})[:8], repeat=3)
    ]
    assert len(texts) > 50_000
    assert from_json.encode_batch(texts) == tok.encode_batch(texts)


def test_merges_of_equal_score_are_ordered_by_what_can_lie_further_left():
    ranked = rank_merges({"a": 0.0, "b": 0.0, "c": 0.0, "bc": -1.0, "ab": -1.0})
    assert (ranked.pairs, ranked.unordered) == ([("a", "b"), ("b", "c")], [])
    circle = rank_merges({"a": 0.0, "b": 0.0, "ab": -1.0, "ba": -1.0})
    assert len(circle.unordered) == 1


PROBE = """
import json, sys
from transformers import AutoTokenizer, PreTrainedTokenizerFast
folder, texts, messages = sys.argv[1], *json.load(sys.stdin)
auto = AutoTokenizer.from_pretrained(folder)
bare = PreTrainedTokenizerFast(tokenizer_file=folder + "/tokenizer.json")
ids = [auto(text).input_ids for text in texts]
assert ids == [bare(text).input_ids for text in texts]
assert "internlm2" not in sys.modules
print(json.dumps({
    "ids": ids,
    "decoded": [auto.decode(i, skip_special_tokens=True) for i in ids],
    "chat": auto.apply_chat_template(messages, add_generation_prompt=True, return_dict=False),
    "roles": [auto.bos_token, auto.eos_token, auto.pad_token, auto.padding_side],
    "padded": auto(["a", "a b c"], padding=True).input_ids,
}))
"""


@pytest.mark.parametrize("model_type", [None, "llama"])
def test_transformers_alone_gives_our_ids(tok, golden, tmp_path, model_type):
    pytest.importorskip("transformers")
    folder = tmp_path / "model"
    export.save_tokenizer(tok, folder, for_transformers=model_type is not None)
    assert (folder / "tokenizer.model").exists() == (model_type is None)
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    # Text that spells control tokens is left out: transformers reads it as control tokens, we do not.
    texts = [text for text, _ in golden if "<s>" not in text and "<|" not in text and "UNUSED" not in text]
    assert len(texts) > 400
    messages = [
        {"role": "system", "content": "简短"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": " again\n"},
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(folder)],
        input=json.dumps([texts, messages]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["ids"] == [tok.encode(text, bos=True) for text in texts]
    assert result["decoded"] == [text.replace("▁", " ") for text in texts]
    assert result["chat"] == tok.apply_chat(messages)
    assert result["roles"] == ["<s>", "</s>", "</s>", "left"]
    assert result["padded"][0][0] == 2


def test_a_saved_folder_reads_back_the_same(tok, byte_level, tmp_path):
    for number, tokenizer in enumerate((tok, byte_level)):
        folder = tmp_path / str(number)
        export.save_tokenizer(tokenizer, folder, for_transformers=False)
        again = Tokenizer.from_pretrained(folder)
        assert again.special_tokens == tokenizer.special_tokens
        assert (again.bos_id, again.eos_id, again.pad_id) == (
            tokenizer.bos_id,
            tokenizer.eos_id,
            tokenizer.pad_id,
        )
        messages = [{"role": "user", "content": "hello"}]
        assert again.apply_chat(messages) == tokenizer.apply_chat(messages)


def test_template_with_default_system_renders_as_ours(tok):
    jinja2 = pytest.importorskip("jinja2")
    with_default = Tokenizer(tok.backend, tok.specials, default_system='Say "hi"\nto 你')
    template = export.chat_template(with_default)
    for messages in ([{"role": "user", "content": "x"}], [{"role": "system", "content": "s"}]):
        rendered = jinja2.Template(template).render(
            messages=messages, bos_token="<s>", add_generation_prompt=True
        )
        assert rendered == with_default.render_chat(messages)


def test_models_that_tokenizer_json_cannot_express_are_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tiny_model())  # adds a dummy prefix
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert export.chat_template(tokenizer) is None
    with pytest.raises(ExportError, match="Only sentencepiece models of type BPE with byte fallback"):
        export.tokenizer_json(tokenizer)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "default", "llama-bpe", "qwen2"])
def test_byte_level_files_of_every_known_kind_load_and_are_lossless(pre):
    from internlm2.tokenizer.tokenizers_backend import TokenizersBackend, byte_level_alphabet

    tokens = [*byte_level_alphabet(), "12", "Ġa"]
    content = export.byte_level_bpe_json(tokens, ["1 2", "Ġ a"], [1] * len(tokens), pre)
    backend = TokenizersBackend(content, where="test")
    ids = backend.encode_ordinary("a a\n12 345's 你")
    assert b"".join(backend.token_bytes[i] for i in ids).decode() == "a a\n12 345's 你"
    digits_stay_apart = pre in ("smollm", "qwen2")
    assert (len(tokens) - 2 in ids) is not digits_stay_apart


@pytest.mark.parametrize(
    ("tokens", "merges", "types", "pre", "message"),
    [
        (["a"], [], [1], "tekken", "The pre-tokenizer 'tekken' is not known. Known: smollm, gpt-2"),
        (["a"], [], [1, 1], "smollm", "1 tokens but 2 token types"),
        (["a"], ["a b"], [1], "smollm", "'a b' does not join two tokens"),
    ],
)
def test_gguf_fields_that_do_not_fit_are_refused(tokens, merges, types, pre, message):
    with pytest.raises(TokenizerError, match=message):
        export.byte_level_bpe_json(tokens, merges, types, pre)
