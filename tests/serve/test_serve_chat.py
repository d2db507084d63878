"""Chat completions through OpenAI's own client: the answers are the engine's, in OpenAI's shape."""

import json

import openai
import pytest
from serve_running import DEFAULTS

from internlm2 import SamplingParams
from internlm2.serve.talk.ask import sampling

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好, world"}]


@pytest.fixture(scope="module")
def chat(tiny):
    return tiny.client().chat.completions


def engine(llm, **changes):
    return llm.chat(MESSAGES, sampling(DEFAULTS, changes))


def test_the_answer_is_the_engines(chat, tiny_llm):
    got = chat.create(model="tiny", messages=MESSAGES)
    expected = engine(tiny_llm)
    (choice,) = got.choices
    assert choice.message.content == expected.text
    assert (choice.message.role, choice.finish_reason, choice.logprobs) == ("assistant", "length", None)
    assert (got.object, got.model, got.id[:9]) == ("chat.completion", "tiny", "chatcmpl-")
    assert got.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert got.usage.completion_tokens == len(expected.token_ids) == 16
    assert got.usage.total_tokens == got.usage.prompt_tokens + 16


def test_a_stream_joins_to_the_same_answer(chat, tiny_llm):
    chunks = list(
        chat.create(model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True})
    )
    *body, last = chunks
    assert last.choices == []
    assert last.usage.completion_tokens == 16
    assert all(chunk.usage is None for chunk in body)
    assert len({chunk.id for chunk in chunks}) == 1
    assert body[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in body[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in body) == engine(tiny_llm).text
    assert [c.choices[0].finish_reason for c in body] == [None] * (len(body) - 1) + ["length"]


def test_a_stream_without_the_option_has_no_usage(chat):
    chunks = list(chat.create(model="tiny", messages=MESSAGES, stream=True, max_tokens=2))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_several_answers_with_a_seed_are_the_engines(chat, tiny_llm):
    options = {"n": 3, "temperature": 0.9, "seed": 7, "max_tokens": 6}
    expected = [sample.text for sample in engine(tiny_llm, **options).samples]
    got = chat.create(model="tiny", messages=MESSAGES, **options)
    assert [(c.index, c.message.content) for c in got.choices] == list(enumerate(expected))
    texts = ["", "", ""]
    reasons = {}
    for chunk in chat.create(model="tiny", messages=MESSAGES, stream=True, **options):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert texts == expected
    assert reasons == dict.fromkeys(range(3), "length")
    negative = chat.create(model="tiny", messages=MESSAGES, temperature=0.9, seed=-5)
    assert negative == chat.create(model="tiny", messages=MESSAGES, temperature=0.9, seed=-5).model_copy(
        update={"id": negative.id, "created": negative.created, "usage": negative.usage}
    )


def test_every_sampling_field_reaches_the_engine(chat, tiny_llm):
    given = {
        "temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": -0.5, "seed": 3,
        "max_tokens": 9,
    }  # fmt: skip
    extra = {
        "top_k": 40, "min_p": 0.01, "typical_p": 0.9, "repetition_penalty": 1.2, "min_tokens": 3,
        "stop_token_ids": [100], "ignore_eos": True, "length_limit": 200,
    }  # fmt: skip
    got = chat.create(
        model="tiny", messages=MESSAGES, logit_bias={"70": 5, "71": -100}, extra_body=extra, **given
    )
    changed = extra | {"stop_token_ids": (100,), "logit_bias": {70: 5, 71: -100}}
    assert got.choices[0].message.content == engine(tiny_llm, **given, **changed).text


def test_log_probabilities_are_the_engines(chat, tiny_llm):
    expected = engine(tiny_llm, logprobs=3, max_tokens=5)
    got = chat.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=3, max_tokens=5)
    content = got.choices[0].logprobs.content
    assert [bytes(t.bytes) for t in content] == [
        tiny_llm.tokenizer.token_bytes[i] for i in expected.token_ids
    ]
    assert [t.logprob for t in content] == pytest.approx([t.logprob for t in expected.logprobs], abs=1e-5)
    assert [len(t.top_logprobs) for t in content] == [3] * 5
    streamed = [
        token
        for chunk in chat.create(
            model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=3, max_tokens=5, stream=True
        )
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [t.token for t in streamed] == [t.token for t in content]
    none = chat.create(model="tiny", messages=MESSAGES, logprobs=True, max_tokens=1)
    assert none.choices[0].logprobs.content[0].top_logprobs == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(chat, tiny_llm, stream):
    whole = engine(tiny_llm).text
    stop = whole[5:7]
    for given in (stop, [stop, "never"]):
        got = chat.create(model="tiny", messages=MESSAGES, stop=given, stream=stream)
        if stream:
            chunks = list(got)
            text = "".join(c.choices[0].delta.content or "" for c in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = got.choices[0].message.content, got.choices[0].finish_reason
        assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_answers_follow_a_form(tools):
    chat = tools.client().chat.completions
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["good", "bad"]}},
        "required": ["mood"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "mood", "schema": schema, "strict": True}}
    for stream in (False, True):
        got = chat.create(
            model="tiny",
            messages=MESSAGES,
            response_format=form,
            max_tokens=200,
            stream=stream,
            temperature=0.5,
        )
        text = (
            "".join(c.choices[0].delta.content or "" for c in got)
            if stream
            else got.choices[0].message.content
        )
        assert json.loads(text)["mood"] in ("good", "bad")
    # any object: what comes is at least its beginning, because the model may fill it for ever
    got = chat.create(model="tiny", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=8)
    assert got.choices[0].message.content.startswith("{")
    plain = chat.create(model="tiny", messages=MESSAGES, response_format={"type": "text"})
    assert (
        plain.choices[0].message.content
        == chat.create(model="tiny", messages=MESSAGES).choices[0].message.content
    )
    got = chat.create(model="tiny", messages=MESSAGES, extra_body={"choice": ["ja", "nein"]})
    assert got.choices[0].message.content in ("ja", "nein")
    got = chat.create(model="tiny", messages=MESSAGES, extra_body={"regex": "[0-9]{3}"})
    assert got.choices[0].message.content.isdigit()


def test_an_answer_goes_back_as_it_came(chat):
    first = chat.create(model="tiny", messages=MESSAGES).choices[0].message
    again = [*MESSAGES, first, {"role": "user", "content": [{"type": "text", "text": "And?"}]}]
    assert chat.create(model="tiny", messages=again).choices[0].message.content is not None
    dumped = [*MESSAGES, first.model_dump(), {"role": "user", "content": "And?"}]
    assert chat.create(model="tiny", messages=dumped).choices[0].message.content is not None


def test_a_final_message_can_be_continued(chat, tiny_llm):
    messages = [*MESSAGES, {"role": "assistant", "content": "The answer"}]
    ids = tiny_llm.tokenizer.apply_chat(messages, continue_final=True)
    expected = tiny_llm.generate([ids], DEFAULTS)[0].text
    got = chat.create(model="tiny", messages=messages, extra_body={"continue_final_message": True})
    assert got.choices[0].message.content == expected


def test_fields_without_meaning_are_taken_and_say_nothing(chat, tiny_llm):
    got = chat.create(
        model="tiny", messages=MESSAGES, user="me", store=False, metadata={"a": "b"}, service_tier="auto",
        prompt_cache_key="k", safety_identifier="s", modalities=["text"], reasoning_effort="none",
    )  # fmt: skip
    assert got.choices[0].message.content == engine(tiny_llm).text


def test_the_model_may_be_left_out(tiny, tiny_llm):
    import httpx2

    got = httpx2.post(f"{tiny.url}/v1/chat/completions", json={"messages": MESSAGES}).json()
    assert got["choices"][0]["message"]["content"] == engine(tiny_llm).text


def test_the_clients_errors_are_the_right_ones(chat, tiny):
    with pytest.raises(openai.NotFoundError, match=r"The model 'gpt-9' is not served here\. Served: tiny"):
        chat.create(model="gpt-9", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as found:
        chat.create(model="tiny", messages=[{"role": "user", "content": "long " * 500}])
    assert found.value.code == "context_length_exceeded"
    assert "maximum context length is 512 tokens" in found.value.message
    with pytest.raises(openai.BadRequestError) as found:
        chat.create(model="tiny", messages=MESSAGES, extra_body={"temprature": 1})
    assert found.value.code == "unknown_parameter"
    assert found.value.param == "temprature"
    assert "Did you mean 'temperature'?" in found.value.message
    models = tiny.client().models
    assert [m.id for m in models.list()] == ["tiny"]
    assert models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        models.retrieve("other")


def test_a_fault_of_ours_is_a_500_that_tells_nothing(tiny, tiny_llm, monkeypatch, caplog):
    def fail(batch):
        raise OSError("secret path /root/x")

    client = tiny.client()
    with monkeypatch.context() as patch:
        patch.setattr(tiny_llm.frontend.engine.runner, "forward", fail)
        with pytest.raises(openai.InternalServerError) as found:
            client.chat.completions.create(model="tiny", messages=MESSAGES)
        assert found.value.code == "internal_error"
        assert "secret" not in str(found.value)
        stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="The server failed while it answered"):
            list(stream)
    assert "secret path" in caplog.text
    assert client.chat.completions.create(model="tiny", messages=MESSAGES).choices


def test_defaults_are_the_servers(tiny_llm, chat):
    assert SamplingParams().temperature == DEFAULTS.temperature
    assert chat.create(model="tiny", messages=MESSAGES).usage.completion_tokens == DEFAULTS.max_tokens
