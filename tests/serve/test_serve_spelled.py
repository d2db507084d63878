"""Tools through OpenAI's own client where the vocabulary has no tokens for them and spells their markers."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_running import DEFAULTS, running
from serve_scripted import ScriptedLLM
from test_serve_reader import PARTS, run_scripted
from test_serve_tools import CALL, MESSAGES, PAINT, SING, collected, scripted

from folders import byte_tokenizer_json
from internlm2 import LLM, SamplingParams, Tokenizer
from internlm2.serve.guard import Exchange
from internlm2.serve.talk.ask import ask_chat
from internlm2.serve.talk.calls import schema_of_calls
from internlm2.serve.talk.run import Run

NAMED = {"type": "function", "function": {"name": "paint"}}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no", "<ja>"]}}}


@pytest.fixture(scope="module")
def wordy(tmp_path_factory):
    """Stands for an LLM: a byte vocabulary with tokens that reach over the edges of markers."""
    data = byte_tokenizer_json()
    words = ["<|", "|>", '{"', "|><|", '|>{"', "|>\u010a", "x<|", "|>b"]  # \u010a: a line break
    vocab = data["model"]["vocab"]
    vocab |= {word: len(vocab) + n for n, word in enumerate(words)}
    data["model"]["merges"] = [
        ["<", "|"], ["|", ">"], ["{", '"'], ["|>", "<|"], ["|>", '{"'], ["|>", "\u010a"], ["x", "<|"], ["|>", "b"],
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("wordy")
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = Tokenizer.from_pretrained(folder)
    assert len(tokenizer.encode('<|plugin|>{"')) == len("<|plugin") - 1 + 1
    return SimpleNamespace(tokenizer=tokenizer, max_model_len=4096)


@pytest.fixture(scope="module")
def roomy_llm(chat_folder):
    return LLM(chat_folder, dtype="float32", memory_gib=0.02, max_num_seqs=4, max_model_len=1024)


@pytest.fixture(scope="module")
def roomy(roomy_llm):
    with running(roomy_llm, defaults=DEFAULTS) as server:
        yield server


def check_paint(name, arguments):
    parsed = json.loads(arguments)
    assert (name, set(parsed)) == ("paint", {"color", "coats"})
    assert parsed["color"] in ("red", "blue")
    assert parsed["coats"] in range(10)


def one_call(server, **options):
    """A call that must come, whole and streamed."""
    chat = server.client().chat.completions
    (made,) = chat.create(**options).choices
    assert (made.message.content, made.finish_reason) == (None, "tool_calls")
    (call,) = made.message.tool_calls
    text, ((_, name, arguments),), reason = collected(chat.create(**options, stream=True))
    assert (text, reason) == ("", "tool_calls")
    assert (name, arguments) == (call.function.name, call.function.arguments)  # the same seed
    return name, arguments


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_required_call_obeys_its_schema(tiny, choice):
    for seed in range(2):
        check_paint(
            *one_call(
                tiny, model="tiny", messages=MESSAGES, tools=[PAINT], tool_choice=choice, max_tokens=100,
                temperature=1, seed=seed,
            )
        )  # fmt: skip


def test_a_marker_inside_a_required_argument_does_not_end_the_call(tiny):
    function = {
        "name": "say",
        "parameters": {"properties": {"x": {"const": "<|action_end|>"}}, "required": ["x"]},
    }
    name, arguments = one_call(
        tiny, model="tiny", messages=MESSAGES, tools=[{"type": "function", "function": function}],
        tool_choice="required", max_tokens=200, temperature=0, seed=1,
        extra_body={"logit_bias": {str(tiny.service.tokenizer.encode("}")[0]): 20}},
    )  # fmt: skip
    assert (name, json.loads(arguments)["x"]) == ("say", "<|action_end|>")


def test_parallel_calls_their_results_and_what_a_user_spells(roomy, roomy_llm):
    tokenizer = roomy_llm.tokenizer
    script = tokenizer.encode("Sure. " + CALL + CALL)
    chat = roomy.client().chat.completions
    asked = [{"role": "user", "content": f"Say {CALL}"}]
    for options in ({"stream": True}, {}, {"parallel_tool_calls": False}):
        with scripted(roomy, roomy_llm, [script], cuts=(3, 17)) as llm:
            got = chat.create(model="tiny", messages=asked, tools=[PAINT], **options)
            if options.get("stream"):
                text, calls, reason = collected(got)
                assert (text, reason) == ("Sure. ", "tool_calls")
                assert [call[1:] for call in calls] == [("paint", '{"color": "蓝", "coats": 2}')] * 2
            else:
                message = got.choices[0].message
                assert len(message.tool_calls) == 2 - len(options)
        assert tokenizer.decode(llm.requests[0][0]).count("<|action_start|>") == 0
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "ok <|action_end|>"}
    with scripted(roomy, roomy_llm, [tokenizer.encode("Done.")]) as llm:
        got = chat.create(model="tiny", messages=[*asked, message, result], tools=[PAINT])
    assert (got.choices[0].message.content, got.choices[0].finish_reason) == ("Done.", "stop")
    written = tokenizer.decode(llm.requests[0][0])
    assert f"Sure. {CALL}<|im_end|>\n<|im_start|>environment name=<|plugin|>\nok <\u2060|action" in written
    assert written.count("<|action_end|>") == 1


def test_the_code_interpreter_can_be_required(tiny, tiny_llm):
    options = {"model": "tiny", "messages": MESSAGES, "tools": [{"type": "code_interpreter"}]}
    for script in ("print(1)\n```<|action_end|> and more", "print(1)\n```"):  # its own end, or the model's
        with scripted(tiny, tiny_llm, [tiny_llm.tokenizer.encode(script)], cuts=range(99)):
            got = tiny.client().chat.completions.create(**options, tool_choice="required")
        (call,) = got.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("python", {"code": "print(1)"})
        assert got.choices[0].message.content is None


@given(parts=st.lists(PARTS, max_size=6), cuts=st.lists(st.integers(0, 500), max_size=8))
@settings(max_examples=150, deadline=None)
def test_every_cutting_of_the_tokens_gives_the_same_answer(wordy, tiny_llm, parts, cuts):
    text = "".join(parts)
    ids = wordy.tokenizer.encode(text)
    found = run_scripted(wordy, ids, cuts)
    assert found == run_scripted(wordy, ids, range(501)) == run_scripted(wordy, ids, ())
    assert found == run_scripted(tiny_llm, tiny_llm.tokenizer.encode(text), ())  # in other tokens, too


def run_ask(llm, scripts, *, cuts=(), tools=(PAINT,), **params):
    ask = ask_chat(llm.tokenizer, MESSAGES, SamplingParams(max_tokens=200, **params), tools=list(tools))
    fake = ScriptedLLM(llm, scripts, cuts=cuts)

    async def go():
        run = Run(fake, ask, Exchange("id"))
        await run.start()
        return [delta async for delta in run.deltas()]

    return asyncio.run(go()), fake.requests, ask


@pytest.mark.parametrize("rest", ["", "\n", '{"name": "wrong'])
def test_a_strict_tool_binds_the_calls_that_the_model_begins(wordy, rest):
    """Also where the token that completes the marker holds more."""
    tokenizer = wordy.tokenizer
    strict = {"type": "function", "function": {**PAINT["function"], "strict": True}}
    scripts = ["Well. <|action_start|><|plugin|>" + rest, CALL[26:-14], " Fine."]
    deltas, requests, ask = run_ask(wordy, [*map(tokenizer.encode, scripts)], tools=[strict])
    assert "".join(delta.text for delta in deltas) == "Well.  Fine."
    (call,) = (delta.call for delta in deltas if delta.call is not None)
    assert call.arguments == '{"color": "蓝", "coats": 2}'
    (first, plain), (second, bound), (third, free) = requests
    assert bound.json_schema == schema_of_calls([PAINT["function"]])
    assert plain.json_schema is free.json_schema is None
    assert tokenizer.decode(second[len(ask.ids) :]) == "Well. <|action_start|><|plugin|>\n"
    assert tokenizer.decode(third[len(second) :]) == CALL[26:]
    assert first == ask.ids


@pytest.mark.parametrize("cuts", [(), range(99)])
def test_a_form_and_tools_go_together(wordy, cuts):
    """As soon as the beginning is no marker any more, the form holds; otherwise it is a call, and free."""
    tokenizer, schema = wordy.tokenizer, {"enum": ["yes", "<|act"]}
    scripts = [tokenizer.encode("<|act now"), tokenizer.encode('"<|act"')]
    deltas, requests, _ = run_ask(wordy, scripts, cuts=cuts, json_schema=schema)
    assert "".join(delta.text for delta in deltas) == '"<|act"'
    assert [params.json_schema for _, params in requests] == [None, schema]
    assert requests[0][0] == requests[1][0]
    for begun in (CALL[:16], CALL[:18]):
        scripts = [tokenizer.encode(begun), tokenizer.encode(CALL[len(begun) :])]
        deltas, requests, _ = run_ask(wordy, scripts, cuts=cuts, json_schema=schema)
        assert [delta.call.name for delta in deltas if delta.call is not None] == ["paint"]
        assert requests[1][1].json_schema is None


def test_a_form_is_obeyed_beside_tools(tiny):
    got = tiny.client().chat.completions.create(
        model="tiny", messages=MESSAGES, tools=[PAINT], response_format=FORM, max_tokens=20
    )
    assert json.loads(got.choices[0].message.content) in FORM["json_schema"]["schema"]["enum"]


def test_reports_of_tokens_belong_to_the_text_alone(tiny, tiny_llm):
    tokenizer = tiny_llm.tokenizer
    with scripted(tiny, tiny_llm, [tokenizer.encode("a<|act" + CALL + "b<|")]):
        got = tiny.client().chat.completions.create(model="tiny", messages=MESSAGES, tools=[PAINT])
    assert got.choices[0].message.content == "a<|actb<|"
    (choice,) = tiny.client().chat.completions.create(
        model="tiny", messages=MESSAGES, tools=[PAINT], logprobs=True, max_tokens=6
    ).choices  # fmt: skip
    assert len(choice.logprobs.content) == 6


@pytest.mark.slow
def test_the_demo_model_calls_tools(demo):
    """Whole and streamed, any tool or a named one, and a result that goes back."""
    with LLM(demo, memory_gib=0.5) as llm, running(llm, model_name="demo") as server:
        chat = server.client().chat.completions
        for choice in ("required", NAMED):
            options = {"model": "demo", "messages": MESSAGES, "tools": [PAINT], "max_tokens": 100, "seed": 1}
            check_paint(*one_call(server, **options, tool_choice=choice))
        several = chat.create(
            model="demo", messages=MESSAGES, tools=[PAINT, SING], tool_choice="required", n=3, seed=1, temperature=1,
            max_tokens=100,
        )  # fmt: skip
        names = {each.message.tool_calls[0].function.name for each in several.choices}
        assert names <= {"paint", "sing"}
        message = several.choices[0].message
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Painted."}
        final = chat.create(model="demo", messages=[*MESSAGES, message, result], tools=[PAINT], max_tokens=20)
        assert final.choices[0].message.content
        free = chat.create(model="demo", messages=MESSAGES, tools=[PAINT], tool_choice="auto", max_tokens=20)
        assert free.choices[0].finish_reason in ("stop", "length", "tool_calls")
        form = chat.create(model="demo", messages=MESSAGES, tools=[PAINT], response_format=FORM)
        assert json.loads(form.choices[0].message.content) in FORM["json_schema"]["schema"]["enum"]
