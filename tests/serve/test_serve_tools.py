"""Tools through OpenAI's own client: calls that must come, calls that may, and their results."""

import json

import openai
import pytest
from serve_running import DEFAULTS, running
from serve_scripted import ScriptedLLM

from internlm2.serve.talk.calls import schema_of_calls

MESSAGES = [{"role": "user", "content": "Paint it."}]
PAINT = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paints.",
        "parameters": {
            "type": "object",
            "properties": {"color": {"enum": ["red", "blue"]}, "coats": {"$ref": "#/$defs/Count"}},
            "required": ["color", "coats"],
            "additionalProperties": False,
            "$defs": {"Count": {"type": "integer", "minimum": 0, "maximum": 9}},
        },
    },
}
SING = {"type": "function", "function": {"name": "sing"}}
CALL = (
    '<|action_start|><|plugin|>\n{"name": "paint", "parameters": {"color": "蓝", "coats": 2}}<|action_end|>'
)


def collected(stream) -> tuple[str, list[tuple[str, str, str]], str]:
    """Text, calls and end of a stream, as agents put them together."""
    text, calls, reason = "", {}, None
    for chunk in stream:
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            known = calls.setdefault(call.index, ["", "", ""])
            known[0] += call.id or ""
            known[1] += call.function.name or ""
            known[2] += call.function.arguments or ""
        assert reason is None
        reason = choice.finish_reason
    assert sorted(calls) == list(range(len(calls)))
    return text, [tuple(calls[n]) for n in sorted(calls)], reason


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
def test_a_required_call_obeys_its_schema(tools, choice, stream):
    for seed in range(3):
        got = tools.client().chat.completions.create(
            model="tiny", messages=MESSAGES, tools=[PAINT], tool_choice=choice, max_tokens=60, temperature=1,
            seed=seed, stream=stream,
        )  # fmt: skip
        if stream:
            text, ((call_id, name, arguments),), reason = collected(got)
        else:
            (made,) = got.choices
            text, reason = made.message.content, made.finish_reason
            (call,) = made.message.tool_calls
            call_id, name, arguments = call.id, call.function.name, call.function.arguments
            assert call.type == "function"
        assert (text or "", name, reason, call_id[:5]) == ("", "paint", "tool_calls", "call_")
        parsed = json.loads(arguments)
        assert parsed["color"] in ("red", "blue")
        assert parsed["coats"] in range(10)


def test_required_takes_any_tool_and_several_answers(tools):
    got = tools.client().chat.completions.create(
        model="tiny", messages=MESSAGES, tools=[PAINT, SING], tool_choice="required", n=8, temperature=1.5, seed=1,
        max_tokens=60,
    )  # fmt: skip
    names = [choice.message.tool_calls[0].function.name for choice in got.choices]
    assert set(names) == {"paint", "sing"}
    ids = [choice.message.tool_calls[0].id for choice in got.choices]
    assert len(set(ids)) == 8
    sung = next(c for c in got.choices if c.message.tool_calls[0].function.name == "sing")
    assert sung.message.tool_calls[0].function.arguments == "{}"


def test_a_required_call_that_is_cut_off_is_text_and_says_length(tools):
    got = tools.client().chat.completions.create(
        model="tiny", messages=MESSAGES, tools=[PAINT], tool_choice="required", max_tokens=3
    )
    (choice,) = got.choices
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    assert choice.message.content.startswith("<|action_start|><|plugin|>\n{")


def test_the_code_interpreter_can_be_required(tools, tool_llm):
    got = tools.client().chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        tools=[{"type": "code_interpreter"}],
        tool_choice="required",
        max_tokens=4,
    )
    assert got.choices[0].message.content.startswith("<|action_start|><|interpreter|>\n```python\n")
    script = tool_llm.tokenizer.encode("print(1)\n```")
    with scripted(tools, tool_llm, [script]) as llm:
        got = tools.client().chat.completions.create(
            model="tiny", messages=MESSAGES, tools=[{"type": "code_interpreter"}], tool_choice="required"
        )
    (call,) = got.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("python", {"code": "print(1)"})
    assert llm.requests[0][1].stop_token_ids == (tool_llm.tokenizer.special_tokens["<|action_end|>"],)


class scripted:  # noqa: N801 - reads as a function
    """The model of a server says what the test wants while the block runs."""

    def __init__(self, server, llm, scripts, **options) -> None:
        self._service, self._real = server.service, server.service.llm
        self._fake = ScriptedLLM(llm, scripts, **options)

    def __enter__(self) -> ScriptedLLM:
        self._service.llm = self._fake
        return self._fake

    def __exit__(self, *_: object) -> None:
        self._service.llm = self._real


@pytest.mark.parametrize("cuts", [(), range(200), (3, 17), (1, 2, 60)])
def test_parallel_calls_and_text_come_whole_in_any_cutting(tools, tool_llm, cuts):
    script = tool_llm.tokenizer.encode("Sure. " + CALL + CALL, allow_special=True)
    chat = tools.client().chat.completions
    with scripted(tools, tool_llm, [script], cuts=cuts):
        text, calls, reason = collected(
            chat.create(model="tiny", messages=MESSAGES, tools=[PAINT], stream=True)
        )
    assert (text, reason) == ("Sure. ", "tool_calls")
    assert [call[1:] for call in calls] == [("paint", '{"color": "蓝", "coats": 2}')] * 2
    assert calls[0][0] != calls[1][0]
    with scripted(tools, tool_llm, [script], cuts=cuts):
        (choice,) = chat.create(model="tiny", messages=MESSAGES, tools=[PAINT]).choices
    assert choice.message.content == "Sure. "
    assert [c.function.arguments for c in choice.message.tool_calls] == ['{"color": "蓝", "coats": 2}'] * 2
    with scripted(tools, tool_llm, [script], cuts=cuts):
        one = chat.create(model="tiny", messages=MESSAGES, tools=[PAINT], parallel_tool_calls=False)
    assert len(one.choices[0].message.tool_calls) == 1


def test_the_prompt_is_the_formatters_and_results_go_back(tools, tool_llm):
    tokenizer = tool_llm.tokenizer
    script = tokenizer.encode(CALL, allow_special=True)
    chat = tools.client().chat.completions
    with scripted(tools, tool_llm, [script, tokenizer.encode("Done.")]) as llm:
        message = chat.create(model="tiny", messages=MESSAGES, tools=[PAINT]).choices[0].message
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": '{"ok": true}'}
        final = chat.create(model="tiny", messages=[*MESSAGES, message, result], tools=[PAINT])
    assert final.choices[0].message.content == "Done."
    assert final.choices[0].finish_reason == "stop"
    first, second = (ids for ids, _ in llm.requests)
    assert first == tokenizer.apply_chat(MESSAGES, tools=[PAINT])
    written = tokenizer.decode(second)
    assert second[: len(first)] == first
    assert f"{CALL}<|im_end|>\n<|im_start|>environment name=<|plugin|>\n" in written
    assert written.endswith('{"ok": true}<|im_end|>\n<|im_start|>assistant\n')


def test_none_and_no_tools_keep_the_model_from_calling(tools, tool_llm):
    tokenizer = tool_llm.tokenizer
    start = tokenizer.special_tokens["<|action_start|>"]
    chat = tools.client().chat.completions
    pushed = {"logit_bias": {str(start): 100}, "max_tokens": 3, "logprobs": True}
    for options in ({}, {"tools": [PAINT], "tool_choice": "none"}):
        (choice,) = chat.create(model="tiny", messages=MESSAGES, **pushed, **options).choices
        assert choice.message.tool_calls is None
        assert len(choice.logprobs.content) == 3
        assert "<|action_start|>" not in [token.token for token in choice.logprobs.content]
    (choice,) = chat.create(model="tiny", messages=MESSAGES, **pushed, tools=[PAINT]).choices
    assert choice.message.content.startswith("<|action_start|>")  # it may, and the bias makes it
    own = [{"role": "system", "name": "plugin", "content": "[]"}, *MESSAGES]  # tools in the model's own way
    (choice,) = chat.create(model="tiny", messages=own, **pushed).choices
    assert choice.message.content.startswith("<|action_start|>")


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_with_half_a_character_or_no_number_harms_nothing(tools, tool_llm, stream):
    """Such JSON is the model's own; it comes to the client as JSON that UTF-8 can hold, and goes back."""
    half = '<|action_start|><|plugin|>\n{"name": "paint", "parameters": {"color": "\\ud83d"}}<|action_end|>'
    nan = '<|action_start|><|plugin|>\n{"name": "paint", "parameters": {"coats": NaN}}<|action_end|>'
    tokenizer, chat = tool_llm.tokenizer, tools.client().chat.completions
    with scripted(tools, tool_llm, [tokenizer.encode(half + nan, allow_special=True)]):
        got = chat.create(model="tiny", messages=MESSAGES, tools=[PAINT], stream=stream)
        if stream:
            text, ((_, _, arguments),), _ = collected(got)
        else:
            message = got.choices[0].message
            text, arguments = message.content, message.tool_calls[0].function.arguments
    assert text == nan
    assert arguments == '{"color": "\\ud83d"}'
    call = {"id": "c", "type": "function", "function": {"name": "paint", "arguments": arguments}}
    again = [*MESSAGES, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "ok"}]
    with scripted(tools, tool_llm, [tokenizer.encode("Good.")]) as llm:
        got = chat.create(model="tiny", messages=again, tools=[PAINT])
    assert got.choices[0].message.content == "Good."
    assert half in tokenizer.decode(llm.requests[0][0])


def test_arguments_nested_without_end_are_refused(tools):
    function = {"name": "paint", "arguments": '{"a":' + "[" * 100_000}
    calls = [{"id": "c", "type": "function", "function": function}]
    with pytest.raises(openai.BadRequestError, match="are not JSON"):
        tools.client().chat.completions.create(
            model="tiny", messages=[*MESSAGES, {"role": "assistant", "tool_calls": calls}]
        )


def test_a_strict_tool_binds_the_calls_that_the_model_begins(tools, tool_llm):
    """The real engine writes the call after a beginning that the test gives."""
    tokenizer = tool_llm.tokenizer
    strict = {"type": "function", "function": {**PAINT["function"], "strict": True}}
    begun = tokenizer.encode("Well. <|action_start|><|plugin|>garbage", allow_special=True)
    body = tokenizer.encode('{"name": "paint", "parameters": {"color": "red", "coats": 1}}')
    after = tokenizer.encode(" Fine.")
    with scripted(tools, tool_llm, [begun, body, after], cuts=(2,)) as llm:
        got = tools.client().chat.completions.create(
            model="tiny", messages=MESSAGES, tools=[strict], seed=1, max_tokens=100
        )
    message = got.choices[0].message
    assert message.content == "Well.  Fine."
    assert message.tool_calls[0].function.arguments == '{"color": "red", "coats": 1}'
    (first, plain), (second, bound), (third, free) = llm.requests
    assert "strict" not in tokenizer.decode(first)
    assert plain.json_schema is None
    assert bound.json_schema == schema_of_calls([PAINT["function"]])
    assert free.json_schema is None
    assert tokenizer.decode(second[len(first) :]) == "Well. <|action_start|><|plugin|>\n"
    assert tokenizer.decode(third[len(second) :]) == tokenizer.decode(body) + "<|action_end|>"
    assert len({plain.seed, bound.seed, free.seed}) == 3


def test_a_form_and_tools_go_together(tools, tool_llm):
    """The first token decides; the rest is bound, or free for the call."""
    tokenizer = tool_llm.tokenizer
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    chat = tools.client().chat.completions
    got = chat.create(model="tiny", messages=MESSAGES, tools=[PAINT], response_format=form)
    assert json.loads(got.choices[0].message.content) in ("yes", "no")
    start = tokenizer.encode("<|action_start|>", allow_special=True)
    rest = tokenizer.encode(CALL, allow_special=True)[1:]
    with scripted(tools, tool_llm, [start, rest]) as llm:
        got = chat.create(model="tiny", messages=MESSAGES, tools=[PAINT], response_format=form)
    assert got.choices[0].message.tool_calls[0].function.name == "paint"
    assert [params.json_schema for _, params in llm.requests] == [None, None]
    assert [params.max_tokens for _, params in llm.requests] == [1, DEFAULTS.max_tokens - 1]


def test_impossible_choices_and_messages_are_refused(tools):
    chat = tools.client().chat.completions
    cases = [
        ({"tool_choice": "required"}, "there are no tools"),
        (
            {"tools": [PAINT], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "the tools are: 'paint'",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "should match pattern"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"messages": [{"role": "tool", "tool_call_id": "c"}]}, "no content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "must hold a function"),
    ]
    for options, message in cases:
        with pytest.raises(openai.BadRequestError, match=message):
            chat.create(**{"model": "tiny", "messages": MESSAGES} | options)
    broken = {"type": "function", "function": {"name": "f", "parameters": {"not": {"type": "string"}}}}
    with pytest.raises(openai.BadRequestError, match="cannot be followed"):
        chat.create(model="tiny", messages=MESSAGES, tools=[broken], tool_choice="required")


def test_adapters_are_models_of_their_own(chat_folder, tmp_path):
    from folders import write_adapter
    from internlm2 import LLM

    llm = LLM(chat_folder, dtype="float32", memory_gib=0.01, adapters={"mine": write_adapter(tmp_path / "a")})
    with running(llm, defaults=DEFAULTS) as server:
        client = server.client()
        assert [model.id for model in client.models.list()] == ["tiny", "mine"]
        texts = [
            client.chat.completions.create(model=name, messages=MESSAGES).choices[0].message.content
            for name in ("tiny", "mine")
        ]
        assert texts == [llm.chat(MESSAGES, DEFAULTS, adapter=name).text for name in (None, "mine")]
        assert texts[0] != texts[1]
