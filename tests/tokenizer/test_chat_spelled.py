"""Tools in a vocabulary without their tokens: markers are spelled, read back however cut, and cannot be forged."""

import json
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import byte_level_folder

from internlm2 import Tokenizer
from internlm2.tokenizer import AssistantParser, CodeCall, InvalidCall, PluginCall, parse_text

SPELLED = ["<|action_start|>", "<|action_end|>", "<|plugin|>", "<|interpreter|>"]
TOOLS = [{"name": "f", "description": "".join(SPELLED)}, {"type": "code_interpreter"}]
USER = {"role": "user", "content": "Go."}
WORDS = st.lists(
    st.text('ab é\n<|>{"_', max_size=5) | st.sampled_from([*SPELLED, "<|action_", "plugin|>"]), max_size=6
)
TEXT = WORDS.map("".join)


def test_the_markers_are_ordinary_tokens_that_spell_the_real_format(tok, byte_level):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
    code = {"function": {"name": "python", "arguments": {"code": "1 + 1"}}}
    messages = [
        {"role": "system", "content": "S"},
        USER,
        {"role": "assistant", "content": "Sure.", "tool_calls": [call, code]},
        {"role": "tool", "tool_call_id": "c", "content": "4"},
        {"role": "environment", "name": "interpreter", "content": "2"},
    ]
    tools = [{"name": "f"}, {"type": "code_interpreter"}]
    ids = byte_level.apply_chat(messages, tools)
    assert "<s>" + byte_level.decode(ids) == tok.decode(tok.apply_chat(messages, tools))
    assert byte_level.render_chat(messages, tools) == byte_level.decode(ids)
    control = {byte_level.id_to_token(i) for i in ids if i in byte_level.specials.names}
    assert control == {"<|im_start|>", "<|im_end|>"}


@given(text=TEXT, role=st.sampled_from(["user", "system", "tool", "environment", "assistant"]), code=TEXT)
@settings(max_examples=200, deadline=None)
def test_nobodys_words_can_spell_a_marker(byte_level, text, role, code):
    call = {"function": {"name": "f", "arguments": {text: text}}}
    script = {"function": {"name": "python", "arguments": {"code": code}}}
    said = [USER, {"role": role, "content": text}, USER, {"role": "assistant", "tool_calls": [call, script]}]
    empty = [USER, {"role": role, "content": ""}, USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}, {"function": {"name": "python", "arguments": {"code": ""}}}]}]  # fmt: skip
    written = byte_level.decode(byte_level.apply_chat(said, TOOLS))
    own = byte_level.decode(byte_level.apply_chat(empty, [{"name": "f"}, {"type": "code_interpreter"}]))
    assert [written.count(marker) for marker in SPELLED] == [own.count(marker) for marker in SPELLED]
    assert json.dumps(TOOLS[0]["description"])[1:-1] in written.replace("\u2060", "")  # nothing is lost
    assert text in written.replace("\u2060", "")


def test_only_a_vocabulary_that_spells_them_breaks_them_up(tok, byte_level):
    said = [{"role": "user", "content": "<|plugin|> <|im_end|>"}]
    assert "<|plugin|> <|im_end|>" in tok.decode(tok.apply_chat(said))
    assert "<\u2060|plugin|> <|im_end|>" in byte_level.decode(byte_level.apply_chat(said))


PARTS = st.sampled_from(
    [
        *SPELLED,
        '<|action_start|><|plugin|>\n{"name": "f", "parameters": {"x": "é <| <|action_"}}<|action_end|>',
        "<|action_start|><|interpreter|>\n```python\n1 < 2\n```<|action_end|>",
        '<|action_start|><|plugin|>{"name"',
    ]
) | st.text("ab é<|>_", max_size=6)


@given(parts=st.lists(PARTS, max_size=5), cuts=st.lists(st.integers(0, 400), max_size=12))
@settings(max_examples=300, deadline=None)
def test_calls_are_read_from_spelled_markers_in_any_tokens_and_any_cutting(byte_level, parts, cuts):
    text = "".join(parts)
    expected = parse_text(text)
    edges = [0, *sorted({cut % (len(text) + 1) for cut in cuts}), len(text)]
    ids = [byte_level.encode(text[a:b]) for a, b in pairwise(edges)]  # cuts change the tokens, too
    parser = AssistantParser(byte_level)
    shown = "".join(map(parser.push, ids)) + parser.finish()
    assert (shown, parser.turn) == (expected.text, expected)
    assert byte_level.parse_assistant([i for each in ids for i in each]) == expected


def test_text_and_calls_come_in_order_even_from_one_token(byte_level):
    call = '<|action_start|><|plugin|>{"name": "f"}<|action_end|>'
    parser = AssistantParser(byte_level)
    found = parser.read(byte_level.encode(f"a{call}b<|acti")) + parser.read_rest()
    assert found == ["a", PluginCall("f", {}), "b", "<|acti"]


def test_a_payload_that_a_grammar_wrote_cannot_end_its_call(byte_level):
    parser = AssistantParser(byte_level)
    parser.push(byte_level.encode("<|action_start|><|plugin|>"))
    body = '{"name": "f", "parameters": {"x": "<|action_end|>"}}'
    assert parser.read(byte_level.encode(body), is_payload=True) == []
    assert parser.read_marker("<|action_end|>") == [PluginCall("f", {"x": "<|action_end|>"})]


def test_the_real_end_of_an_answer_ends_a_spelled_call(byte_level):
    ids = byte_level.encode("<|action_start|><|interpreter|>1", allow_special=True)
    (call,) = byte_level.parse_assistant([*ids, *byte_level.stop_ids]).calls
    assert isinstance(call, InvalidCall)
    assert byte_level.parse_assistant([*ids, *byte_level.encode("<|action_end|>")]).calls == (CodeCall("1"),)
    assert "<|im_end|>" not in SPELLED


def test_what_the_assistant_says_is_learned_with_its_spelled_calls(tmp_path):
    tokenizer = Tokenizer.from_pretrained(byte_level_folder(tmp_path))
    call = {"function": {"name": "f", "arguments": {}}}
    tokens = tokenizer.apply_chat_with_mask(
        [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
    )
    learned = [i for i, has_loss in zip(tokens.ids, tokens.loss_mask, strict=True) if has_loss]
    assert tokenizer.decode(learned) == (
        '<|action_start|><|plugin|>\n{"name": "f", "parameters": {}}<|action_end|><|im_end|>'
    )
