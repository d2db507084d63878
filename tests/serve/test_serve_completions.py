"""Text completions and token endpoints against the engine."""

import httpx2
import openai
import pytest
from serve_running import DEFAULTS

from internlm2.serve.talk.ask import sampling

PROMPTS = ["The capital", "你好"]


@pytest.fixture(scope="module")
def complete(tiny):
    return tiny.client().completions.create


def engine(llm, prompt, **changes):
    return llm.generate([prompt], sampling(DEFAULTS, changes))[0]


def test_texts_and_ids_are_gone_on_with(complete, tiny_llm):
    ids = [tiny_llm.encode(prompt) for prompt in PROMPTS]
    expected = [engine(tiny_llm, prompt).text for prompt in PROMPTS]
    for prompt in (PROMPTS, ids):
        got = complete(model="tiny", prompt=prompt)
        assert [(c.index, c.text) for c in got.choices] == list(enumerate(expected))
        assert got.usage.prompt_tokens == sum(map(len, ids))
        assert got.usage.completion_tokens == 32
    for prompt in (PROMPTS[0], ids[0]):
        got = complete(model="tiny", prompt=prompt)
        assert [c.text for c in got.choices] == expected[:1]
        assert got.choices[0].finish_reason == "length"


def test_streams_of_several_texts_and_answers_join(complete, tiny_llm):
    options = {"n": 2, "temperature": 1.0, "seed": 5}
    expected = [s.text for prompt in PROMPTS for s in engine(tiny_llm, prompt, **options).samples]
    assert [c.text for c in complete(model="tiny", prompt=PROMPTS, **options).choices] == expected
    texts, reasons, usage = [""] * 4, [None] * 4, None
    for chunk in complete(
        model="tiny", prompt=PROMPTS, stream=True, stream_options={"include_usage": True}, **options
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == expected
    assert reasons == ["length"] * 4
    assert usage.completion_tokens == 64


def test_echo_scores_a_given_text(complete, tiny_llm):
    text = "The capital of"
    got = complete(model="tiny", prompt=text, echo=True, max_tokens=0, logprobs=2)
    (choice,) = got.choices
    assert (choice.text, choice.finish_reason) == (text, "length")
    expected = engine(tiny_llm, text, prompt_logprobs=2, max_tokens=1).prompt_logprobs
    found = choice.logprobs
    assert found.tokens == ["<s>", *text]
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx([t.logprob for t in expected], abs=1e-5)
    assert found.top_logprobs[0] is None
    assert [found.text_offset[1:][n] for n in range(len(text))] == list(range(len(text)))
    score = tiny_llm.score([text[:4]], [text[4:]])[0]
    assert sum(found.token_logprobs[5:]) == pytest.approx(score.logprob, abs=1e-4)


def test_echo_comes_before_the_answer(complete, tiny_llm):
    answer = engine(tiny_llm, PROMPTS[1]).text
    assert complete(model="tiny", prompt=PROMPTS[1], echo=True).choices[0].text == PROMPTS[1] + answer
    stream = complete(model="tiny", prompt=PROMPTS[1], echo=True, stream=True)
    assert "".join(c.choices[0].text for c in stream) == PROMPTS[1] + answer
    got = complete(model="tiny", prompt=PROMPTS[1], echo=True, logprobs=0, max_tokens=3)
    assert len(got.choices[0].logprobs.tokens) == len(tiny_llm.encode(PROMPTS[1])) + 3


def test_logprobs_of_a_stream_are_those_of_the_whole(complete):
    whole = complete(model="tiny", prompt="ab", logprobs=3).choices[0].logprobs
    tokens, offsets = [], []
    for chunk in complete(model="tiny", prompt="ab", logprobs=3, stream=True):
        found = chunk.choices[0].logprobs
        tokens += found.tokens
        offsets += found.text_offset
    assert tokens == whole.tokens
    assert offsets[0] == whole.text_offset[0] == 0


def test_what_cannot_be_done_is_refused(complete):
    cases = [
        ({"suffix": "x"}, "suffix is not supported"),
        ({"best_of": 3}, "best_of is not supported"),
        ({"max_tokens": 0}, "needs echo=true"),
        ({"echo": True, "logprobs": 1, "stream": True}, "does not go with stream"),
        ({"stream_options": {"include_usage": True}}, "only goes with stream=true"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, 99999]}, "token id 99999"),
        ({"n": 2}, "temperature"),
        ({"temperature": 1e-7}, "temperature is 1e-07"),
        ({"logit_bias": {"x": 1}}, "keys are token ids"),
        ({"logit_bias": {"9999": 1}}, "logit_bias holds 9999"),
        ({"extra_body": {"regex": "("}}, "cannot be followed"),
        ({"extra_body": {"regex": "a", "choice": ["b"]}}, "an answer has one form"),
    ]
    for options, message in cases:
        with pytest.raises(openai.BadRequestError, match=message):
            complete(**{"model": "tiny", "prompt": "x"} | options)


def test_tokens_of_texts_and_chats(tiny, tiny_llm):
    tokenizer = tiny_llm.tokenizer

    def post(path, **body):
        return httpx2.post(tiny.url + path, json=body).json()

    assert post("/tokenize", prompt="a<s>")["tokens"] == tokenizer.encode("a<s>", bos=True)
    special = post("/tokenize", prompt="a<s>", add_bos=False, allow_special=True)
    assert special["tokens"] == tokenizer.encode("a<s>", allow_special=True)
    messages = [{"role": "user", "content": "Hi"}]
    found = post("/tokenize", messages=messages)
    assert found == {"tokens": tokenizer.apply_chat(messages), "count": found["count"], "max_model_len": 512}
    assert found["count"] == len(found["tokens"])
    assert post("/detokenize", tokens=found["tokens"])["prompt"] == tokenizer.render_chat(messages)
    plain = post("/detokenize", tokens=found["tokens"], skip_special=True)["prompt"]
    assert plain == tokenizer.decode(found["tokens"], skip_special=True)
    assert "Give one of prompt and messages" in post("/tokenize")["error"]["message"]
    assert "outside the vocabulary" in post("/detokenize", tokens=[10**6])["error"]["message"]
    assert httpx2.post(tiny.url + "/detokenize", json={"tokens": [-1]}).status_code == 400
