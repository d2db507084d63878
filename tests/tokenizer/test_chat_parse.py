"""One formatter and one parser: what is written is read back, however it is split; nothing gets lost."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from internlm2.tokenizer import (
    AssistantParser,
    AssistantTextParser,
    CodeCall,
    InvalidCall,
    PluginCall,
    parse_text,
)

TOOLS = [{"name": "f"}, {"type": "code_interpreter"}]
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=30)
CALLS = st.lists(
    st.builds(
        PluginCall, st.sampled_from(["f", "天气"]), st.dictionaries(TEXT, TEXT | st.integers(), max_size=2)
    )
    | st.builds(CodeCall, TEXT),
    max_size=3,
)


def message(text, calls):
    functions = [
        {"name": "python", "arguments": {"code": call.code}}
        if isinstance(call, CodeCall)
        else {"name": call.name, "arguments": call.parameters}
        for call in calls
    ]
    return {"role": "assistant", "content": text, "tool_calls": [{"function": f} for f in functions]}


def answer(tok, text, calls):
    """The ids and the text that a model would produce for this answer."""
    user = {"role": "user", "content": "x"}
    prompt = tok.apply_chat([user], TOOLS)
    whole = tok.apply_chat([user, message(text, calls)], TOOLS, False)
    rendered = tok.render_chat([user, message(text, calls)], TOOLS, False)[
        len(tok.render_chat([user], TOOLS)) :
    ]
    return whole[len(prompt) :], rendered


@given(text=TEXT, calls=CALLS, sizes=st.lists(st.integers(1, 4), max_size=40))
@settings(max_examples=200, deadline=None)
def test_ids_are_read_back_however_they_are_split(tok, text, calls, sizes):
    ids, _ = answer(tok, text, calls)
    parser, shown = AssistantParser(tok), ""
    for size in sizes:
        shown += parser.push(ids[:size])
        ids = ids[size:]
    shown += parser.push(ids) + parser.finish()
    assert (shown, parser.turn.text, list(parser.turn.calls), parser.ended) == (text, text, calls, True)


@given(text=TEXT, calls=CALLS, sizes=st.lists(st.integers(1, 9), max_size=60))
@settings(max_examples=200, deadline=None)
def test_text_is_read_back_even_when_markers_are_split(tok, text, calls, sizes):
    assume("<|" not in text + repr(calls))  # spelled markers are markers where only text is at hand
    _, rendered = answer(tok, text, calls)
    parser, shown = AssistantTextParser(), ""
    for size in sizes:
        shown += parser.push(rendered[:size])
        rendered = rendered[size:]
    shown += parser.push(rendered) + parser.finish()
    assert (shown, parser.turn.text, list(parser.turn.calls)) == (text, text, calls)


def test_a_read_answer_becomes_a_message_again(tok):
    ids, _ = answer(tok, "Let me see.", [PluginCall("f", {"a": 1}), CodeCall("1\n")])
    again = tok.parse_assistant(ids).to_message()
    user = {"role": "user", "content": "x"}
    assert tok.apply_chat([user, again], TOOLS, False)[-len(ids) :] == ids
    assert [c["id"] for c in again["tool_calls"]] == ["call_0", "call_1"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("<|action_start|><|plugin|>\n{'name'}<|action_end|>", "its body is not JSON"),
        ('<|action_start|><|plugin|>\n["f"]<|action_end|>', "its body is not {"),
        ('<|action_start|><|plugin|>\n{"name": "f", "parameters": 1}<|action_end|>', "its body is not {"),
        ('<|action_start|>{"name": "f"}<|action_end|>', "must be followed by"),
        ('<|action_start|><|plugin|>\n{"name": "f"}', "cut off before"),
        (
            '<|action_start|><|plugin|>\n{"name": "f"}<|action_start|><|plugin|>{"name": "g"}<|action_end|>',
            "next call",
        ),
        ("<|action_start|><|plugin|>" + "[" * 100_000 + "<|action_end|>", "its body is not JSON"),
    ],
)
def test_a_broken_call_is_kept_whole(tok, body, reason):
    for turn in (
        parse_text("Hm. " + body),
        tok.parse_assistant(tok.encode("Hm. " + body, allow_special=True)),
    ):
        assert turn.text == "Hm. "
        invalid = turn.calls[0]
        assert isinstance(invalid, InvalidCall)
        assert reason in invalid.reason
        assert body.startswith(invalid.raw)
        assert turn.to_message()["content"] == "Hm. " + invalid.raw


def test_markers_spelled_in_plain_tokens_are_text(tok):
    spelled = '<|action_start|><|plugin|>\n{"name": "f"}<|action_end|>'
    turn = tok.parse_assistant(tok.encode(spelled))
    assert (turn.text, turn.calls) == (spelled, ())


def test_small_slips_of_the_model_are_forgiven(tok):
    assert parse_text("<|action_start|><|interpreter|>\nprint(1)<|action_end|>").calls == (
        CodeCall("print(1)"),
    )
    arguments = parse_text('<|action_start|><|plugin|>{"name": "f", "arguments": {"a": 1}}<|action_end|>\n')
    assert arguments.calls == (PluginCall("f", {"a": 1}),)
    assert parse_text(["a<|acti", "on_end|>b<|im_e", "nd|>junk"]).text == "a<|action_end|>b"


def test_what_follows_the_end_is_no_part_of_the_answer(tok):
    ids = [*tok.encode("Hi"), 92542, 364, 92543]
    parser = AssistantParser(tok)
    assert parser.push(ids) == "Hi"
    assert parser.ended
    assert parser.push(9843) == ""
    assert tok.parse_assistant([*tok.encode("Hi"), 2, 9843]).text == "Hi"
