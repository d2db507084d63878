"""What the engine promises, on a real model. In float32 each way gives the log-probabilities of transformers' Llama, to
1e-5 of the largest logit. With packed bfloat16, the default on a CPU, each way gives the same bits.

Run: pytest -m slow tests/engine/test_demo_model.py (four minutes; the tiny models are tested on every run).
"""

import pytest
import torch

from internlm2 import LLM, SamplingParams
from internlm2.cli.main import run
from internlm2.kernels.library import library

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
    "little memory": {"max_model_len": 64, "memory_gib": 7 * 16 * 46080 / 2**30},
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
def expected(demo, prompts, tmp_path_factory):
    """By transformers, one prompt at a time: greedy tokens, their log-probabilities, and what 1e-5 of a logit is."""
    from transformers import LlamaForCausalLM

    torch.set_num_threads(2)
    folder = tmp_path_factory.mktemp("llama") / "demo"
    assert run(["model", "export", str(demo), str(folder), "--to", "llama", "--dtype", "float32"]) == 0
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            whole = model.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None)
            logits = model(whole).logits[0]
        new = whole[0, len(prompt) :]
        logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, new[:, None])[:, 0]
        answers.append((new.tolist(), logprobs, 1e-5 * float(logits.abs().max())))
    return answers


def check(outs, expected):
    for out, (tokens, logprobs, tolerance) in zip(outs, expected, strict=True):
        assert out.token_ids == tokens
        ours = torch.tensor([token.logprob for token in out.logprobs])
        torch.testing.assert_close(ours, logprobs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_what_transformers_gives(demo, prompts, expected, way):
    torch.set_num_threads(2)
    llm = LLM(demo, dtype="float32", **WAYS[way])
    if way == "little memory":  # room for two of the three short ones
        prompts, expected = prompts[:3], expected[:3]
    try:
        together = llm.generate(prompts, PARAMS)
        check(together, expected)
        if way == "little memory":
            assert llm.stats.num_preemptions > 0
        if way == "prompt lookup":
            assert llm.stats.num_accepted_tokens > 10
        again = llm.generate(prompts, PARAMS)  # the prefixes are cached now
        check(again, expected)
        if way != "little memory":  # there the cache may have given way
            assert (again[-1].num_cached_tokens > 300) == (way != "deterministic")
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
    for one, other, (_, _, tolerance) in zip(cached, fresh, expected, strict=True):
        assert one.token_ids == other.token_ids
        ours, theirs = ([token.logprob for token in out.logprobs] for out in (one, other))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    assert cached[-1].num_cached_tokens > 300


PACKED_WAYS = {
    "all at once": {},
    "small chunks": {"chunk_tokens": 48},
    "little memory": {"max_model_len": 64, "memory_gib": 7 * 16 * 23040 / 2**30},
    "prompt lookup": {"speculative": "lookup"},
}
needs_kernels = pytest.mark.skipif(
    library() is None, reason="torch's own products depend on the number of rows"
)


@pytest.fixture(scope="module")
def lone(demo, prompts):
    """Packed answers, each computed alone."""
    torch.set_num_threads(2)
    llm = LLM(demo, quantization="bfloat16", prefix_cache=False)
    return [llm.generate([prompt], PARAMS)[0] for prompt in prompts]


@needs_kernels
@pytest.mark.parametrize("way", PACKED_WAYS)
def test_every_way_gives_the_same_bits_with_packed_weights(demo, prompts, lone, way):
    torch.set_num_threads(2)
    llm = LLM(demo, quantization="bfloat16", **PACKED_WAYS[way])
    if way == "little memory":  # room for two of the three short ones
        prompts, lone = prompts[:3], lone[:3]
    for _ in range(2):  # the second time from the cache
        for out, alone in zip(llm.generate(prompts, PARAMS), lone, strict=True):
            assert (out.token_ids, out.logprobs, out.text) == (alone.token_ids, alone.logprobs, alone.text)
    if way == "little memory":
        assert llm.stats.num_preemptions > 0
    else:
        assert llm.stats.num_cached_tokens > 300
    if way == "prompt lookup":
        assert llm.stats.num_accepted_tokens > 10
    streamed = list(llm.stream(prompts[0], PARAMS))
    assert [token for piece in streamed for token in piece.token_ids] == lone[0].token_ids
    assert "".join(piece.text for piece in streamed) == lone[0].text


@needs_kernels
def test_packed_weights_are_as_near_to_transformers_as_plain_bfloat16(demo, prompts, expected):
    torch.set_num_threads(2)
    answers = [tokens for tokens, _, _ in expected]
    exact = torch.cat([logprobs for _, logprobs, _ in expected])

    def loss(quantization: str) -> float:
        scores = LLM(demo, quantization=quantization).score(prompts, answers)
        found = torch.tensor([logprob for score in scores for logprob in score.token_logprobs])
        return float((found - exact).norm() / exact.norm())

    packed, plain = loss("bfloat16"), loss("none")
    print(f"relative error of log-probabilities: packed {packed:.4f}, plain {plain:.4f}")
    assert 0 < packed < 1.1 * plain
