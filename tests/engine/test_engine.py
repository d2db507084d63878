"""The engine against the plain loop: paged = dense, batch = alone, chunked = whole, cached = recomputed, and so on."""

import random

import pytest
import torch
from lone import answers, make_engine, make_sequence, read_off

from goldens import golden_folder
from internlm2 import SamplingParams, load_model
from internlm2.engine.schedule.request import Task
from internlm2.model.heads import CausalLM
from reference.plain_loop import generate

PARAMS = [
    SamplingParams(max_tokens=24),
    SamplingParams(max_tokens=24, temperature=0.9, top_p=0.9, seed=5),
    SamplingParams(max_tokens=9, repetition_penalty=1.2, presence_penalty=0.5),
]


@pytest.fixture(scope="module", params=["gqa", "dynamic-ntk"])
def model(request) -> CausalLM:
    return load_model(golden_folder(request.param))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(3)
    lengths = [1, 2, 4, 15, 16, 17, 63, 90, 33, 5]
    return [[rng.randrange(3, 500) for _ in range(length)] for length in lengths]


def plain(model, prompts, params):
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    return [
        generate(model, [prompt], own, vocab_size=512)[0].token_ids
        for prompt, own in zip(prompts, each, strict=True)
    ]


def namespaces(model, prompts, params):
    """Beyond the trained length each limit has a rotary base of its own."""
    longest = model.config.max_position_embeddings
    limits = [len(prompt) + params.max_tokens for prompt in prompts]
    return [limit if model.config.rope_scaling and limit > longest else None for limit in limits]


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("sizes", [
    {},
    {"chunk_tokens": 1},
    {"chunk_tokens": 512, "page_size": 16},
    {"max_num_seqs": 1},
    {"page_size": 1, "chunk_tokens": 7},
    {"prefix_cache": False},
    {"deterministic": True},
])  # fmt: skip
def test_many_at_once_get_what_each_gets_from_the_plain_loop(model, prompts, params, sizes):
    engine = make_engine(model, **sizes)
    together = answers(engine, prompts, params, namespaces=namespaces(model, prompts, params))
    assert together == plain(model, prompts, params)


@pytest.mark.parametrize("num_host_pages", [0, 20])
def test_preempted_sequences_end_as_undisturbed_ones(model, prompts, num_host_pages):
    engine = make_engine(model, num_pages=32, num_host_pages=num_host_pages)
    params = SamplingParams(max_tokens=30)
    together = answers(engine, prompts, params, namespaces=namespaces(model, prompts, params))
    assert together == plain(model, prompts, params)
    assert engine.stats.num_preemptions > 0


def test_a_cached_prefix_is_as_good_as_a_computed_one(model, prompts):
    params = SamplingParams(max_tokens=20, length_limit=200)
    engine = make_engine(model)
    first = answers(engine, prompts, params)
    turns = [[*p, *a, 7, 8, 9] for p, a in zip(prompts, first, strict=True)]
    before = engine.stats.num_prompt_tokens
    fresh = answers(make_engine(model), turns, params)
    assert answers(engine, turns, params) == fresh
    assert engine.stats.num_cached_tokens > 300
    assert engine.stats.num_prompt_tokens - before < 100


def test_idle_pages_come_back_from_host_memory(model, prompts):
    params = SamplingParams(max_tokens=4, length_limit=200)
    engine = make_engine(model, num_pages=26, num_host_pages=200, max_num_seqs=1)
    first = answers(engine, prompts, params)
    before = engine.stats.num_cached_tokens
    assert answers(engine, prompts, params) == first
    assert engine.stats.num_cached_tokens - before > 150


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_logits_are_bitwise_the_same_in_any_company(prompts, dtype):
    model = load_model(golden_folder("gqa"), dtype=dtype)
    params = SamplingParams(max_tokens=12, logprobs=3)

    def logprobs(engine, subset):
        found = {}
        for number in subset:
            engine.add(*make_sequence(number, prompts[number], params))
        while engine.has_work:
            for update in engine.step():
                found.setdefault(update.sequence.sequence_id, []).extend(update.logprobs)
        return found

    together = logprobs(make_engine(model, num_pages=60, deterministic=True), range(len(prompts)))
    for number in range(len(prompts)):
        alone = logprobs(make_engine(model, deterministic=True), [number])
        assert alone[number] == together[number]


def test_int8_keys_and_values_stay_close(prompts):
    model = load_model(golden_folder("gqa"))
    scores = [
        read_off(make_engine(model, kv_dtype=kind), prompts[7], Task.SCORE, top=1).prompt_logprobs
        for kind in (None, "int8")
    ]
    exact, packed = (torch.tensor([token.logprob for token in score]) for score in scores)
    assert (exact - packed).abs().max() < 0.1
    assert not torch.equal(exact, packed)


def test_prompt_logprobs_are_those_of_one_forward_pass(model, prompts):
    prompt = prompts[7]
    with torch.no_grad():
        expected = model(torch.tensor([prompt]))[0].log_softmax(-1)
    found = read_off(make_engine(model), prompt, Task.SCORE, top=2).prompt_logprobs
    targets = expected[range(len(prompt) - 1), prompt[1:]]
    torch.testing.assert_close(torch.tensor([t.logprob for t in found]), targets, rtol=1e-5, atol=1e-5)
    best = expected[:-1].topk(2).values
    top = torch.tensor([[value for _, value in token.top] for token in found])
    torch.testing.assert_close(top, best, rtol=1e-5, atol=1e-5)


def test_an_embedding_is_the_mean_of_the_last_hidden_states(model, prompts):
    prompt = prompts[7]
    with torch.no_grad():
        expected = model.hidden_states(torch.tensor([prompt]))[0].mean(0)
    vector = read_off(make_engine(model), prompt, Task.EMBED).vector
    torch.testing.assert_close(vector, expected, rtol=1e-5, atol=1e-5)


def test_an_aborted_sequence_leaves_nothing_and_harms_nobody(model, prompts):
    engine = make_engine(model, num_pages=40)
    params = SamplingParams(max_tokens=30)
    doomed, state = make_sequence(99, prompts[7], params)
    engine.add(doomed, state)
    steps = iter(range(1000))

    def abort_once():
        if next(steps) == 9:
            engine.finish(doomed)
            engine.finish(doomed)  # once more does nothing

    prompts = prompts[:4]
    found = {}
    for number, prompt in enumerate(prompts):
        engine.add(*make_sequence(number, prompt, params))
    while engine.has_work:
        for update in engine.step():
            found.setdefault(update.sequence.sequence_id, []).extend(update.token_ids)
        abort_once()
        engine.scheduler.check_integrity()
    assert engine.scheduler.pool.num_held == 0
    if model.config.rope_scaling is None:
        assert [found[n] for n in range(4)] == plain(model, prompts, params)


def test_an_interrupted_step_loses_nothing(model, prompts, monkeypatch):
    engine = make_engine(model)
    params = SamplingParams(max_tokens=20)
    forward, calls = engine.runner.forward, iter(range(1000))

    def interrupted(batch):
        hidden = forward(batch)
        if next(calls) in (3, 8, 9):
            raise KeyboardInterrupt
        return hidden

    monkeypatch.setattr(engine.runner, "forward", interrupted)
    found = {n: [] for n in range(len(prompts))}
    spaces = namespaces(model, prompts, params)
    for number, prompt in enumerate(prompts):
        engine.add(*make_sequence(number, prompt, params, namespace=spaces[number]))
    num_interruptions = 0
    while engine.has_work:
        try:
            for update in engine.step():
                found[update.sequence.sequence_id] += update.token_ids
        except KeyboardInterrupt:
            num_interruptions += 1
        engine.scheduler.check_integrity()
    assert num_interruptions == 3
    assert [found[n] for n in range(len(prompts))] == plain(model, prompts, params)


def test_a_sequence_whose_logits_are_not_finite_ends_alone(prompts):
    model = load_model(golden_folder("gqa"))
    weight = model.model.tok_embeddings.weight
    with torch.no_grad():
        weight[prompts[4][3]] = torch.nan
    engine = make_engine(model)
    params = SamplingParams(max_tokens=5)
    engine.add(*make_sequence(0, prompts[4], params))
    engine.add(*make_sequence(1, [5, 6, 7], params))
    last = {}
    while engine.has_work:
        for update in engine.step():
            last[update.sequence.sequence_id] = update
    assert last[0].finish_reason == "error"
    assert "not finite" in str(last[0].error)
    assert last[1].finish_reason == "length"


def test_a_short_prompt_beside_a_long_one_is_computed_in_the_next_step(prompts):
    model = load_model(golden_folder("gqa"))
    engine = make_engine(model, num_pages=2000, chunk_tokens=64)
    rng = random.Random(0)
    long_prompt = [rng.randrange(3, 500) for _ in range(4000)]
    engine.add(*make_sequence(0, long_prompt, SamplingParams(max_tokens=2)))
    engine.step()
    short, state = make_sequence(1, prompts[6][:40], SamplingParams(max_tokens=2))
    engine.add(short, state)
    engine.step()
    assert short.num_outputs == 1
