"""What the engine promises, on a real model in float32: each way gives the log-probabilities of transformers' Llama.

Run: pytest -m slow tests/engine/test_demo_model.py (three minutes; the tiny models are tested on every run).
"""

import pytest
import torch

from internlm2 import LLM, SamplingParams

pytestmark = pytest.mark.slow

TEXTS = [
    "The capital of France is",
    "def add(a, b):\n    return a + b\n\ndef add(a, b):\n    return",
    "从前有一座山，山上有一座庙，",
    "Printing changed how people shared what they knew. " * 40,
]
NUM_TOKENS = 24
PARAMS = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1)
WAYS = {
    "plain": {},
    "small chunks": {"chunk_tokens": 48},
    "two at once": {"max_num_seqs": 2},
    "little memory": {"max_model_len": 480, "memory_gib": 33 * 16 * 46080 / 2**30},
    "prompt lookup": {"speculative": "lookup"},
    "deterministic": {"deterministic": True},
    "two processes": {"tensor_parallel": 3},
}


@pytest.fixture(scope="module")
def prompts(demo):
    from internlm2.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(demo)
    return [tokenizer.encode(text, bos=True) for text in TEXTS]


@pytest.fixture(scope="module")
def expected(demo, prompts):
    """Greedy tokens and their log-probabilities by transformers, one prompt at a time."""
    from transformers import LlamaForCausalLM

    torch.set_num_threads(2)
    model = LlamaForCausalLM.from_pretrained(demo, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            whole = model.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None)
            logprobs = model(whole).logits[0].log_softmax(-1)
        new = whole[0, len(prompt) :]
        answers.append((new.tolist(), logprobs[len(prompt) - 1 : -1].gather(1, new[:, None])[:, 0]))
    return answers


def check(outs, expected):
    for out, (tokens, logprobs) in zip(outs, expected, strict=True):
        assert out.token_ids == tokens
        ours = torch.tensor([token.logprob for token in out.logprobs])
        torch.testing.assert_close(ours, logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_what_transformers_gives(demo, prompts, expected, way):
    torch.set_num_threads(2)
    llm = LLM(demo, dtype="float32", **WAYS[way])
    try:
        together = llm.generate(prompts, PARAMS)
        check(together, expected)
        if way == "little memory":
            assert llm.stats.num_preemptions > 0
        if way == "prompt lookup":
            assert llm.stats.num_accepted_tokens > 10
        again = llm.generate(prompts, PARAMS)  # the prefixes are cached now
        check(again, expected)
        assert (again[-1].num_cached_tokens > 300) == (way not in ("deterministic", "little memory"))
        streamed = list(llm.stream(prompts[0], PARAMS))
        assert [token for piece in streamed for token in piece.token_ids] == expected[0][0]
        assert "".join(piece.text for piece in streamed) == together[0].text
    finally:
        llm.close()


def test_the_next_turn_of_a_chat_is_that_of_a_fresh_model(demo, prompts, expected):
    torch.set_num_threads(2)
    llm = LLM(demo, dtype="float32")
    first = llm.generate(prompts, PARAMS)
    turns = [[*prompt, *out.token_ids, 198, 198] for prompt, out in zip(prompts, first, strict=True)]
    cached = llm.generate(turns, PARAMS)
    fresh = LLM(demo, dtype="float32", prefix_cache=False).generate(turns, PARAMS)
    for one, other in zip(cached, fresh, strict=True):
        assert one.token_ids == other.token_ids
        ours, theirs = ([token.logprob for token in out.logprobs] for out in (one, other))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert cached[-1].num_cached_tokens > 300
