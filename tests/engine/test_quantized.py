"""The engine on packed weights: what a request gets does not depend on its company, and the options say what goes."""

import pytest
import torch

from internlm2 import LLM, SamplingParams
from internlm2.errors import RequestError
from internlm2.quant.linear import PackedLinear

PROMPTS = ["Hello", "你好, world", [1, *range(40, 120)], "A longer text that takes more than one page. " * 3]


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_many_at_once_and_cached_get_what_each_gets_alone(chat_folder, kind):
    llm = LLM(chat_folder, dtype="float32", quantization=kind, chunk_tokens=48)
    assert isinstance(llm.model.output, PackedLinear)
    params = SamplingParams(max_tokens=16, ignore_eos=True, logprobs=1)
    alone = LLM(chat_folder, dtype="float32", quantization=kind, prefix_cache=False)
    expected = [alone.generate([prompt], params)[0] for prompt in PROMPTS]
    for _ in range(2):  # the second time from the cache
        for one, other in zip(llm.generate(PROMPTS, params), expected, strict=True):
            assert one.token_ids == other.token_ids
            ours, theirs = ([token.logprob for token in out.logprobs] for out in (one, other))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert llm.stats.num_cached_tokens > 0


def test_few_bits_stay_close_and_fewer_less_so(chat_folder):
    texts, endings = ["The river was", "def add(a, b):"], [" wide and slow", " return a + b"]
    exact, *others = (
        torch.tensor(
            [
                logprob
                for score in LLM(chat_folder, dtype="float32", quantization=kind).score(texts, endings)
                for logprob in score.token_logprobs
            ]
        )
        for kind in (None, "bfloat16", "int8", "int4")
    )
    losses = [float((other - exact).abs().mean()) for other in others]
    assert 0 < losses[1] < losses[2] < 0.1
    assert losses[0] < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int3"}, "quantization is 'int3', but must be one of bfloat16, int8, int4"),
        ({"quantization": "int8", "deterministic": True}, "deterministic"),
        ({"quantization": "int8", "adapters": {}}, "adapters"),
        ({"quantization": "int8", "tensor_parallel": 2}, "tensor_parallel"),
        ({"quantization": "int8", "dtype": "float16"}, "dtype='bfloat16'"),
    ],
)
def test_what_does_not_go_together_is_refused(chat_folder, options, message):
    with pytest.raises(RequestError, match=message):
        LLM(chat_folder, **options)


def test_a_packed_model_drafts_for_and_is_drafted_for(chat_folder):
    plain = LLM(chat_folder, dtype="float32", quantization="int8")
    guessing = LLM(chat_folder, dtype="float32", quantization="int8", speculative=chat_folder)
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    assert guessing.generate(PROMPTS, params) == plain.generate(PROMPTS, params)
    assert guessing.stats.num_accepted_tokens > 0
