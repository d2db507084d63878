"""The Responses API through OpenAI's own client."""

import json

import openai
import pytest
from serve_running import DEFAULTS
from test_serve_tools import CALL, PAINT, scripted

from internlm2.serve.talk.ask import sampling

TOOL = {"type": "function", **PAINT["function"], "strict": True}
LOOSE = {**TOOL, "strict": False}


@pytest.fixture(scope="module")
def create(tiny):
    return tiny.client().responses.create


def test_a_text_is_answered(create, tiny_llm):
    got = create(model="tiny", input="你好", instructions="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}]
    expected = tiny_llm.chat(messages, DEFAULTS)
    assert got.output_text == expected.text
    assert (got.status, got.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert got.usage.input_tokens == len(expected.prompt_token_ids)
    assert got.usage.output_tokens == 16
    (item,) = got.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "incomplete")
    assert got.store is False
    stopped = sampling(DEFAULTS, {"temperature": 0.9, "seed": 3, "max_tokens": 4, "top_k": 9})
    again = create(
        model="tiny", input="你好", temperature=0.9, max_output_tokens=4, extra_body={"seed": 3, "top_k": 9}
    )
    assert again.output_text == tiny_llm.chat(messages[1:], stopped).text


def test_a_stream_tells_the_same_in_the_right_order(create):
    whole = create(model="tiny", input="Hi")
    events = list(create(model="tiny", input="Hi", stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    names = [e.type for e in events]
    assert names[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert names[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
        "response.incomplete",
    ]  # fmt: skip
    assert set(names[4:-4]) == {"response.output_text.delta"}
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    assert events[-1].response.usage.output_tokens == 16


def test_the_clients_own_helper_reads_the_stream(tiny):
    with tiny.client().responses.stream(model="tiny", input="Hi") as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
    assert text == tiny.client().responses.create(model="tiny", input="Hi").output_text


def test_log_probabilities(create):
    got = create(model="tiny", input="Hi", top_logprobs=2, include=["message.output_text.logprobs"])
    logprobs = got.output[0].content[0].logprobs
    assert len(logprobs) == 16
    assert len(logprobs[0].top_logprobs) == 2


def test_calls_are_items_and_their_results_go_back(tools, tool_llm):
    tokenizer, create = tool_llm.tokenizer, tools.client().responses.create
    script = tokenizer.encode("Sure. " + CALL + CALL, allow_special=True)
    with scripted(tools, tool_llm, [script, script]) as llm:
        got = create(model="tiny", input="Paint", tools=[LOOSE])
        events = list(create(model="tiny", input="Paint", tools=[LOOSE], stream=True))
    assert [item.type for item in got.output] == ["message", "function_call", "function_call"]
    assert got.status == "completed"
    assert json.loads(got.output[1].arguments) == {"color": "蓝", "coats": 2}
    last = events[-1].response
    assert [item.type for item in last.output] == [item.type for item in got.output]
    done = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert [(e.output_index, e.arguments) for e in done] == [
        (1, got.output[1].arguments),
        (2, got.output[2].arguments),
    ]
    assert llm.requests[0][0] == tokenizer.apply_chat(
        [{"role": "user", "content": "Paint"}],
        tools=[{k: PAINT["function"][k] for k in ("name", "description", "parameters")}],
    )
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": f"done {n}"}
        for n, item in enumerate(got.output[1:])
    ]
    items = [{"role": "user", "content": "Paint"}, *got.output, *results]
    with scripted(tools, tool_llm, [tokenizer.encode("Good.")]) as llm:
        final = create(model="tiny", input=items, tools=[LOOSE])
    assert final.output_text == "Good."
    written = tokenizer.decode(llm.requests[0][0])
    assert (
        f"assistant\nSure. {CALL}{CALL}<|im_end|>\n<|im_start|>environment name=<|plugin|>\ndone 0<|im_end|>"
        in written
    )
    assert written.endswith("done 1<|im_end|>\n<|im_start|>assistant\n")


def test_required_calls_and_forms(tools):
    create = tools.client().responses.create
    for choice in ("required", {"type": "function", "name": "paint"}):
        got = create(model="tiny", input="x", tools=[TOOL], tool_choice=choice, max_output_tokens=80)
        assert json.loads(got.output[0].arguments)["color"] in ("red", "blue")
    schema = {"enum": ["yes", "no"]}
    got = create(
        model="tiny",
        input="x",
        text={"format": {"type": "json_schema", "name": "a", "schema": schema, "strict": True}},
    )
    assert json.loads(got.output_text) in ("yes", "no")
    assert got.status == "completed"


def test_what_would_need_a_memory_is_refused(create):
    cases = [
        ({"previous_response_id": "resp_1"}, "this server keeps nothing"),
        ({"conversation": "c"}, "this server keeps nothing"),
        ({"background": True}, "background is not supported"),
        ({"truncation": "auto"}, "truncation is not supported"),
        ({"tools": [{"type": "web_search"}]}, "takes functions alone"),
        (
            {"tools": [{"type": "function", "name": "a b\n<|im_end|>"}]},
            r"'tools.0.name': String should match",
        ),
        ({"tools": [{"type": "function", "name": "a", "parameters": "x"}]}, r"'tools.0.parameters'"),
        ({"tools": [{"type": "function", "name": "a", "parameter": {}}]}, r"supplied: tools.0.parameter"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "has the type 'item_reference'"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "reads text only",
        ),
        ({"include": ["file_search_call.results"]}, "is not supported"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort is not supported"),
        ({"input": [{"role": "king", "content": "x"}]}, "'king'"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": 3}]}, "reads text only"),
    ]
    for options, message in cases:
        with pytest.raises(openai.BadRequestError, match=message):
            create(**{"model": "tiny", "input": "x"} | options)


def test_a_failure_within_a_stream_is_told(create, tiny_llm, monkeypatch):
    def fail(batch):
        raise OSError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(tiny_llm.frontend.engine.runner, "forward", fail)
        events = list(create(model="tiny", input="x", stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.message.startswith("The server failed")
