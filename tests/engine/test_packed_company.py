"""Packed weights, the default on a CPU: an answer and its log-probabilities have the same bits in any company, with any
sizes of pages and chunks, from cached keys, after a preemption, with guesses and as a stream.

`test_engine.py` and `test_speculative.py` say the same of plain weights in float32, where the last bits may differ.
"""

import random

import pytest
import torch
from lone import make_engine, read_off, updates

from goldens import golden_folder
from internlm2 import LLM, SamplingParams, load_model
from internlm2.checkpoint.open import open_checkpoint
from internlm2.checkpoint.save import save_checkpoint
from internlm2.engine.schedule.request import Task
from internlm2.kernels.library import library
from internlm2.model.heads import CausalLM
from internlm2.quant.linear import quantize_model
from internlm2.quant.weight import WeightFormat
from reference.plain_loop import generate

pytestmark = pytest.mark.skipif(library() is None, reason="torch's own products depend on the number of rows")

LIMIT = 200  # one rotary base for all, so that prefixes are shared
GREEDY = SamplingParams(max_tokens=12, logprobs=2, prompt_logprobs=1, length_limit=LIMIT)
SAMPLED = SamplingParams(
    max_tokens=16, logprobs=2, temperature=0.9, top_p=0.9, repetition_penalty=1.1, seed=5, length_limit=LIMIT
)
FINE = WeightFormat("int8", 32, activation_bits=15)  # whose rounding is too fine to be seen


def packed_model(name: str, kind: str | WeightFormat, dtype: str) -> CausalLM:
    model = load_model(golden_folder(name), dtype=dtype)
    quantize_model(model, kind)
    return model


@pytest.fixture(
    scope="module",
    params=[
        ("gqa", "bfloat16", "bfloat16"),  # the default
        ("gqa", "int8", "float32"),
        ("dynamic-ntk", "int4", "bfloat16"),
    ],
    ids="-".join,
)
def model(request) -> CausalLM:
    return packed_model(*request.param)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(3)
    lengths = [1, 15, 16, 17, 63, 90]
    return [[rng.randrange(3, 500) for _ in range(length)] for length in lengths]


def served(engine, prompts, params, **options):
    """Of each prompt: its tokens, their log-probabilities and those of the prompt."""
    every = updates(engine, prompts, params, **options)
    return [
        (
            [token for update in own for token in update.token_ids],
            [logprob for update in own for logprob in update.logprobs],
            own[-1].prompt_logprobs,
        )
        for own in every
    ]


def alone(model, prompts, params, **sizes):
    return [served(make_engine(model, **sizes), [prompt], params)[0] for prompt in prompts]


@pytest.fixture(scope="module")
def lone(model, prompts):
    """What each prompt gets alone, under each params."""
    return {params.max_tokens: alone(model, prompts, params) for params in (GREEDY, SAMPLED)}


def test_company_chunks_and_pages_change_no_bit(model, prompts, lone):
    for params, sizes in (
        (GREEDY, {}),
        (SAMPLED, {"chunk_tokens": 3}),
        (SAMPLED, {"chunk_tokens": 512, "page_size": 16}),
        (GREEDY, {"max_num_seqs": 1}),
        (GREEDY, {"page_size": 1, "chunk_tokens": 7}),
        (SAMPLED, {"prefix_cache": False}),
    ):
        assert served(make_engine(model, **sizes), prompts, params) == lone[params.max_tokens], sizes


def test_int8_keys_and_values_keep_the_bits_too(model, prompts):
    expected = alone(model, prompts, GREEDY, kv_dtype="int8")
    for chunk_tokens in (7, 512):
        engine = make_engine(model, kv_dtype="int8", chunk_tokens=chunk_tokens)
        assert served(engine, prompts, GREEDY) == expected


@pytest.mark.parametrize("num_host_pages", [0, 20])
def test_a_preempted_sequence_loses_no_bit(model, prompts, lone, num_host_pages):
    engine = make_engine(model, num_pages=44, num_host_pages=num_host_pages)
    assert served(engine, prompts, SAMPLED) == lone[SAMPLED.max_tokens]
    assert engine.stats.num_preemptions > 0


def test_a_cached_prefix_is_the_computed_one(model, prompts):
    engine = make_engine(model)
    first = served(engine, prompts, SAMPLED)
    turns = [[*prompt, *tokens, 7, 8, 9] for prompt, (tokens, _, _) in zip(prompts, first, strict=True)]
    assert served(engine, turns, SAMPLED) == alone(model, turns, SAMPLED, prefix_cache=False)
    assert engine.stats.num_cached_tokens > 200


def test_keys_that_come_back_from_host_memory_are_the_same(model, prompts, lone):
    engine = make_engine(model, num_pages=28, num_host_pages=200, max_num_seqs=1)
    first = served(engine, prompts, SAMPLED)
    before = engine.stats.num_cached_tokens
    assert served(engine, prompts, SAMPLED) == first == lone[SAMPLED.max_tokens]
    assert engine.stats.num_cached_tokens - before > 150


def test_what_is_computed_again_after_an_interruption_has_the_same_bits(model, prompts, lone):
    engine = make_engine(model)
    steps = iter(range(1000))

    def restart():
        if next(steps) in (3, 8, 9):
            engine.scheduler.restart()  # as `step` does when something is raised

    assert served(engine, prompts, SAMPLED, each_step=restart) == lone[SAMPLED.max_tokens]


@pytest.mark.parametrize(("name", "kind", "tolerance"), [
    ("gqa", FINE, 1e-3), ("dynamic-ntk", FINE, 1e-3), ("gqa", "bfloat16", 0.02),
])  # fmt: skip
def test_pages_give_what_dense_keys_and_values_give(name, kind, tolerance, prompts):
    model = packed_model(name, kind, "float32")
    for prompt in prompts[3:]:
        with torch.no_grad():
            expected = model(torch.tensor([prompt]))[0].log_softmax(-1)
        found = read_off(make_engine(model), prompt, Task.SCORE, top=1).prompt_logprobs
        targets = expected[range(len(prompt) - 1), prompt[1:]]
        torch.testing.assert_close(
            torch.tensor([token.logprob for token in found]), targets, rtol=0, atol=tolerance
        )
    if kind is FINE:
        params = SamplingParams(max_tokens=20)
        plain = [generate(model, [prompt], params, vocab_size=512)[0].token_ids for prompt in prompts[:3]]
        assert [tokens for tokens, _, _ in served(make_engine(model), prompts[:3], params)] == plain


# -- a whole LLM ------------------------------------------------------------------------------------------

REPETITIVE = [1, *([70, 71, 72, 73, 74] * 8)]
TEXTS = ["Hello", REPETITIVE, "one two three one two three one two", [1, *range(20, 90)], "a" * 40]
CASES = [
    SamplingParams(max_tokens=60, ignore_eos=True, logprobs=1),
    SamplingParams(max_tokens=60, temperature=0.05, seed=4, top_k=20, logprobs=1),
    SamplingParams(max_tokens=40, repetition_penalty=1.05, ignore_eos=True, logprobs=1),
]


@pytest.fixture(scope="module")
def half_folder(chat_folder, tmp_path_factory):
    """The tiny chat model with weights in bfloat16."""
    folder = tmp_path_factory.mktemp("half") / "model"
    save_checkpoint(open_checkpoint(chat_folder), folder, dtype=torch.bfloat16)
    return folder


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("who", ["lookup", "itself"])
def test_guesses_change_no_bit(half_folder, kind, who):
    one_by_one = LLM(half_folder, quantization=kind)
    guessing = LLM(half_folder, quantization=kind, speculative="lookup" if who == "lookup" else half_folder)
    for params in CASES:
        assert guessing.generate(TEXTS, params) == one_by_one.generate(TEXTS, params)
    assert guessing.stats.num_accepted_tokens > 20


@pytest.mark.parametrize("options", [{}, {"speculative": "lookup"}], ids=["", "lookup"])
def test_hardly_any_memory_changes_no_bit(half_folder, options):
    page_bytes = 16 * 2 * 2 * 2 * 16 * 2  # two layers, keys and values, two heads of 16
    small = LLM(
        half_folder,
        quantization="bfloat16",
        max_model_len=160,
        memory_gib=14.5 * page_bytes / (1 << 30),
        chunk_tokens=24,
        **options,
    )
    assert small.frontend.engine.scheduler.pool.num_pages == 14
    large = LLM(half_folder, quantization="bfloat16", max_model_len=160)
    for params in CASES:
        found = small.generate(TEXTS, params)
        assert [out.samples for out in found] == [out.samples for out in large.generate(TEXTS, params)]
    assert small.stats.num_preemptions > 0


def test_a_stream_joined_is_the_whole_answer(half_folder):
    llm = LLM(half_folder, quantization="bfloat16")
    for text, params in zip(TEXTS, CASES, strict=False):
        pieces = list(llm.stream(text, params))
        [whole] = llm.generate([text], params)
        assert "".join(piece.text for piece in pieces) == whole.text
        assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
        assert [logprob for piece in pieces for logprob in piece.logprobs] == whole.logprobs


def test_what_is_read_off_a_text_is_the_same_in_company(half_folder):
    company, single = (LLM(half_folder, quantization="bfloat16", chunk_tokens=size) for size in (24, 512))
    endings = [" and more"] * len(TEXTS)
    together = company.score([text for text in TEXTS if isinstance(text, str)], endings[:3])
    assert together == [single.score([text], endings[:1])[0] for text in TEXTS if isinstance(text, str)]
    torch.testing.assert_close(
        company.embed(TEXTS), torch.cat([single.embed([text]) for text in TEXTS]), rtol=1e-5, atol=1e-6
    )
