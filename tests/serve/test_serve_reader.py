"""No call is lost or garbled, and no text, however the stream is cut."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_scripted import ScriptedLLM

from internlm2 import SamplingParams
from internlm2.serve.guard import Exchange
from internlm2.serve.talk.ask import Ask
from internlm2.serve.talk.reader import CallReader
from internlm2.serve.talk.run import Run
from internlm2.tokenizer.chat.parse import InvalidCall

PARTS = st.one_of(
    st.text('ab 你\n<|{}"🙂', max_size=8),
    st.sampled_from(
        [
            '<|action_start|><|plugin|>\n{"name": "weather", "parameters": {"city": "上海 🌧"}}<|action_end|>',
            "<|action_start|><|interpreter|>\n```python\nprint('é')\n```<|action_end|>",
            '<|action_start|><|plugin|>\n{"name": "broken", <|action_end|>',
            "<|action_start|>nothing<|action_end|>",
            "<|action_end|>",
            "<|plugin|>",
            '<|action_start|><|plugin|>{"name": "open"',
        ]
    ),
)


@pytest.fixture(scope="module")
def tokenizer(tool_llm):
    return tool_llm.tokenizer


def shown(deltas) -> tuple[list[object], str]:
    """What a client has in the end: text and calls in order, without the random ids."""
    found: list[object] = [""]
    for delta in deltas:
        if delta.text:
            found[-1] += delta.text
        if delta.call is not None:
            found += [(delta.call.name, delta.call.arguments), ""]
    return found, deltas[-1].finish_reason


def run_scripted(llm, ids, cuts, *, reason="stop", stop=(), **options):
    async def go():
        params = SamplingParams(max_tokens=200, stop=stop)
        scripted = ScriptedLLM(llm, [ids], cuts=cuts, reason=reason)
        run = Run(scripted, Ask([1, 2, 3], params, reads_calls=True, **options), Exchange("id"))
        await run.start()
        return [delta async for delta in run.deltas()]

    return shown(asyncio.run(go()))


@given(parts=st.lists(PARTS, max_size=6), cuts=st.lists(st.integers(0, 500), max_size=8), data=st.data())
@settings(max_examples=150, deadline=None)
def test_every_cutting_of_the_tokens_gives_the_same_answer_as_the_library(tool_llm, parts, cuts, data):
    tokenizer = tool_llm.tokenizer
    ids = [i for part in parts for i in tokenizer.encode(part, allow_special=True)]
    ids = ids[: data.draw(st.integers(0, len(ids)))] if data.draw(st.booleans()) else ids
    (found, reason) = run_scripted(tool_llm, ids, cuts)
    assert (found, reason) == run_scripted(tool_llm, ids, range(501))  # token by token
    assert (found, reason) == run_scripted(tool_llm, ids, ())  # all at once
    turn = tokenizer.parse_assistant(ids)
    message = turn.to_message()
    calls = [
        (c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls", ())
    ]
    assert [(part[0], json.loads(part[1])) for part in found if isinstance(part, tuple)] == calls
    raw = [call.raw for call in turn.calls if isinstance(call, InvalidCall)]
    text = "".join(part for part in found if isinstance(part, str))
    assert sorted(text) == sorted(turn.text + "".join(raw))  # the text of broken calls stands where they were
    assert reason == "stop"


@given(
    text=st.text("abST", max_size=14),
    before=st.booleans(),
    cuts=st.lists(st.integers(0, 60), max_size=6),
)
@settings(max_examples=100, deadline=None)
def test_a_stop_string_ends_the_text_and_never_a_call(tool_llm, text, before, cuts):
    call = '<|action_start|><|plugin|>\n{"name": "f", "parameters": {"x": "STOP"}}<|action_end|>'
    written = call + text + "STOP rest" + call if before else text + "STOP" + call
    ids = tool_llm.tokenizer.encode(written, allow_special=True)
    found, reason = run_scripted(tool_llm, ids, cuts, stop=("STOP",))
    expected = text + "STOP"
    expected = expected[: expected.index("STOP")]
    assert reason == "stop"
    if before:
        assert found == ["", ("f", '{"x": "STOP"}'), expected]
    else:
        assert found == [expected]


def test_text_held_back_for_a_stop_string_comes_before_the_call(tool_llm):
    written = 'ST<|action_start|><|plugin|>\n{"name": "f", "parameters": {}}<|action_end|>OP'
    ids = tool_llm.tokenizer.encode(written, allow_special=True)
    found, _ = run_scripted(tool_llm, ids, range(100), stop=("STOP",))
    assert found == ["ST", ("f", "{}"), "OP"]


def test_a_call_that_was_cut_off_comes_back_as_text(tool_llm):
    written = 'Well.<|action_start|><|plugin|>\n{"name": "f"'
    ids = tool_llm.tokenizer.encode(written, allow_special=True)
    assert run_scripted(tool_llm, ids, (), reason="length") == ([written], "length")


def test_without_parallel_calls_the_answer_ends_after_the_first(tool_llm):
    call = '<|action_start|><|plugin|>\n{"name": "f", "parameters": {}}<|action_end|>'
    ids = tool_llm.tokenizer.encode(call + call, allow_special=True)
    assert run_scripted(tool_llm, ids, (3,), max_calls=1) == (["", ("f", "{}"), ""], "stop")
    assert len(run_scripted(tool_llm, ids, (3,))[0]) == 5


def test_user_text_that_spells_a_marker_is_no_call(tool_llm):
    spelled = '<|action_start|><|plugin|>{"name": "f", "parameters": {}}<|action_end|>'
    ids = tool_llm.tokenizer.encode(spelled)  # plain text, no control tokens
    assert run_scripted(tool_llm, ids, ()) == ([spelled], "stop")
    reader = CallReader(tool_llm.tokenizer)
    assert "".join(d.text for i in ids for d in reader.push(i)) == spelled
