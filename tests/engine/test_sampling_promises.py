"""The promises to one row among many: company changes nothing, failures stay alone, reports are the model's own."""

import math

import numpy as np
import pytest
import torch
from sampling_cases import HARD, OnlyThese, changed, random_logits, state_of

from internlm2.engine.sampling.params import SamplingParams
from internlm2.engine.sampling.penalties import RowChanges
from internlm2.engine.sampling.sampler import (
    Sampled,
    SamplingState,
    non_finite_error,
    nothing_left_error,
    prompt_logprobs,
    sample,
    uniform,
)
from reference import slow_sampling

NOT_FINITE, NOTHING_LEFT = str(non_finite_error()), str(nothing_left_error())


# --- One row among many ---------------------------------------------------------------------------------------------


def mixed_states(vocab_size: int) -> list[SamplingState]:
    """Every kind of row: greedy, free, filtered, pushed, constrained, stateful."""
    every = [{"temperature": 0.0}, *({"temperature": 1.0} | values for values in HARD)]
    every += [values | {"repetition_penalty": 1.3, "presence_penalty": 0.4} for values in every[::3]]
    every += [values | {"bad_words_ids": ((1,), (2, 3)), "min_tokens": 9} for values in every[::4]]
    every += [{"temperature": 0.9, "logit_bias": {4: 3.0}, "logprobs": 2}, {"logprobs": 5}]
    return [
        state_of(
            SamplingParams(**values), vocab_size=vocab_size, outputs=[4, 2], stop_ids=frozenset({0}), seed=row,
            constraint=OnlyThese(*range(row % 7, vocab_size, 3)) if row % 5 == 4 else None,
        )
        for row, values in enumerate(every)
    ]  # fmt: skip


@pytest.mark.parametrize("vocab_size", [31, 9001])
def test_a_row_alone_equals_the_row_in_a_batch(vocab_size):
    states = mixed_states(vocab_size)
    logits = random_logits(2, len(states), vocab_size)
    together = sample(logits, states)
    alone = [sample(logits[row : row + 1], [state]) for row, state in enumerate(states)]
    assert together.token_ids == [one.token_ids[0] for one in alone]
    assert together.logprobs == [one.logprobs[0] for one in alone]
    assert together.errors == [None] * len(states)
    backwards = sample(logits.flip(0), states[::-1])
    assert backwards.token_ids == together.token_ids[::-1]


def test_the_callers_logits_stay_as_they_are():
    states = mixed_states(31)
    logits = random_logits(2, len(states), 31)
    before = logits.clone()
    sample(logits, states)
    torch.testing.assert_close(logits, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "values", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9, "bad_words_ids": ((7,),)}]
)
def test_several_indices_of_one_state_equal_one_after_the_other(values):
    params = SamplingParams(logit_bias={3: 1.0}, min_tokens=1, logprobs=2, **values)
    state = state_of(params, vocab_size=101, stop_ids=frozenset({9}), outputs=[5])
    assert state.is_stateless
    logits = random_logits(3, 6, 101)
    together = sample(logits, [state] * 6, indices=range(1, 7))
    one_by_one: list[Sampled] = []
    for row in logits:
        one_by_one.append(sample(row[None], [state]))
        state.push(one_by_one[-1].token_ids[0])
    assert together.token_ids == [one.token_ids[0] for one in one_by_one]
    assert together.logprobs == [one.logprobs[0] for one in one_by_one]


@pytest.mark.parametrize(
    ("values", "is_stateless"),
    [
        ({}, True),
        ({"temperature": 1.0, "top_k": 3, "logit_bias": {1: 1.0}, "bad_words_ids": ((1,),)}, True),
        ({"repetition_penalty": 1.1}, False),
        ({"presence_penalty": 1.0}, False),
        ({"frequency_penalty": -1.0}, False),
        ({"bad_words_ids": ((1, 2),)}, False),
        ({"min_tokens": 2}, False),
    ],
)
def test_a_state_is_stateless_unless_the_answer_so_far_matters(values, is_stateless):
    state = state_of(SamplingParams(**values), vocab_size=9, stop_ids=frozenset({0}), outputs=[3])
    assert state.is_stateless == is_stateless
    assert not state_of(SamplingParams(), vocab_size=9, constraint=OnlyThese(1)).is_stateless


def test_min_tokens_hold_a_state_back_only_until_they_are_said():
    state = state_of(SamplingParams(min_tokens=1), vocab_size=9, stop_ids=frozenset({0}))
    assert not state.is_stateless
    state.push(1)
    assert state.is_stateless


def test_no_rows_give_nothing():
    assert sample(torch.zeros(0, 5), []) == Sampled([], [], [])


# --- Failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_not_finite_fail_alone(value):
    states = mixed_states(9001)
    logits = random_logits(2, len(states), 9001)
    expected = sample(logits, states)
    bad = set(range(0, len(states), 2))
    for row in bad:
        logits[row, (row * 997) % 9001] = value
    found = sample(logits, states)
    for row, error in enumerate(found.errors):
        assert str(error) == (NOT_FINITE if row in bad else "None")
        assert found.token_ids[row] == (0 if row in bad else expected.token_ids[row])
        assert found.logprobs[row] == (None if row in bad else expected.logprobs[row])
    assert found.failed == [row in bad for row in range(len(states))]


@pytest.mark.parametrize("values", [{}, {"temperature": 1.0}, {"logit_bias": {1: 1.0}}])
def test_a_row_without_any_possible_token_is_not_finite(values):
    state = state_of(SamplingParams(**values), vocab_size=5)
    assert str(sample(torch.full((1, 5), -math.inf), [state]).errors[0]) == NOT_FINITE


def test_a_bad_value_beyond_the_vocabulary_disturbs_nothing():
    logits = random_logits(0, 1, 40)
    logits[0, 33:] = math.nan
    for temperature in (0.0, 1.0):
        state = state_of(SamplingParams(temperature=temperature), vocab_size=33)
        assert sample(logits, [state]) == sample(logits[:, :33], [state])


def test_the_messages_of_failed_rows_say_what_to_do():
    assert NOT_FINITE == (
        "The model's logits are not finite, so no token can be chosen. In float16 values overflow easily: "
        "try bfloat16 or float32. Otherwise the weights are damaged."
    )
    assert NOTHING_LEFT == (
        "No token is allowed here: the grammar, bad words and min_tokens of this request exclude each other. "
        "Loosen one of them."
    )


@pytest.mark.parametrize("vocab_size", [31, 32, 33, 9001])
@pytest.mark.parametrize("values", [{}, {"temperature": 1.0}, {"temperature": 5.0, "top_p": 0.99}])
def test_a_grammar_is_obeyed(values, vocab_size):
    allowed = [0, 7, 30, vocab_size - 1]
    params = SamplingParams(**values)
    logits = random_logits(0, 50, vocab_size)
    states = [
        state_of(params, vocab_size=vocab_size, seed=s, constraint=OnlyThese(*allowed)) for s in range(50)
    ]
    found = sample(logits, states).token_ids
    for row, token_id, state in zip(logits, found, states, strict=True):
        masked = torch.full_like(row, -math.inf)
        masked[allowed] = row[allowed]
        torch.testing.assert_close(changed(row, state), masked, rtol=0, atol=0)
        assert token_id == (
            slow_sampling.token(masked.numpy(), params, uniform(state.seed, 0)) if values else masked.argmax()
        )


def test_a_grammar_hears_what_was_chosen():
    grammar = OnlyThese(1, 2)
    state_of(SamplingParams(), vocab_size=5, constraint=grammar, outputs=[2, 1])
    assert grammar.seen == [2, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_nothing_left_says_so_alone(temperature):
    logits = random_logits(0, 4, 33)
    params = SamplingParams(temperature=temperature, bad_words_ids=((4,),), min_tokens=1)
    grammars = [OnlyThese(4), OnlyThese(9), OnlyThese(), OnlyThese(4, 32)]  # 9 is a stop id
    states = [
        state_of(params, vocab_size=33, constraint=grammar, stop_ids=frozenset({9})) for grammar in grammars
    ]
    found = sample(logits, states)
    assert [str(error) for error in found.errors] == [NOTHING_LEFT] * 3 + ["None"]
    assert found.token_ids == [0, 0, 0, 32]


# --- The vocabulary and the reports ---------------------------------------------------------------------------------


def test_rows_of_the_embedding_beyond_the_vocabulary_are_never_chosen():
    logits = random_logits(0, 40, 200)
    logits[:, 101:] += 50
    for values in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}, {"logit_bias": {1: 2.0}}):
        params = SamplingParams(logprobs=3, **values)
        states = [state_of(params, vocab_size=101, seed=seed, outputs=[1]) for seed in range(40)]
        found = sample(logits, states)
        assert found.token_ids == sample(logits[:, :101].contiguous(), states).token_ids
        assert max(found.token_ids) < 101
        assert all(token_id < 101 for one in found.logprobs if one for token_id, _ in one.top)


def test_stop_ids_beyond_the_vocabulary_hold_nothing_back():
    logits = random_logits(0, 1, 33)
    state = state_of(SamplingParams(min_tokens=2), vocab_size=33, stop_ids=frozenset({5, 40}))
    torch.testing.assert_close(changed(logits[0], state).isinf(), torch.arange(33) == 5)
    assert sample(logits, [state]).errors == [None]


@pytest.mark.parametrize("top", [0, 1, 5, 64])
def test_prompt_logprobs_equal_log_softmax(top):
    logits = random_logits(0, 37, 41)  # more rows than one piece holds
    targets = np.random.default_rng(0).integers(0, 41, 37).tolist()
    expected = logits.double().log_softmax(-1)
    found = prompt_logprobs(logits, targets, top)
    chosen = torch.tensor([one.logprob for one in found], dtype=torch.float64)
    torch.testing.assert_close(chosen, expected[range(37), targets], rtol=1e-5, atol=1e-5)
    best = expected.topk(min(top, 41))
    ids = torch.tensor([[token_id for token_id, _ in one.top] for one in found], dtype=torch.long)
    values = torch.tensor([[value for _, value in one.top] for one in found], dtype=torch.float64)
    torch.testing.assert_close(ids, best.indices)
    torch.testing.assert_close(values, best.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_logprobs_of_a_row_alone_have_the_bits_of_the_batch(num_threads):
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(96, 49_152, generator=generator)  # torch would share out a lone one
    targets = torch.randint(49_152, (96,), generator=generator).tolist()
    torch.set_num_threads(num_threads)
    alone = [prompt_logprobs(row[None], [target], 2)[0] for row, target in zip(logits, targets, strict=True)]
    for size in (2, 5, 96):
        assert prompt_logprobs(logits[:size], targets[:size], 2) == alone[:size]


def test_logprobs_are_the_models_own_before_penalties_and_temperature():
    logits = random_logits(0, 3, 45)
    expected = logits.double().log_softmax(-1)
    values = {"temperature": 0.2, "repetition_penalty": 1.9, "logit_bias": {7: 100}}
    states = [state_of(SamplingParams(logprobs=k, **values), vocab_size=41, prompt=[7]) for k in (0, 4)]
    found = sample(logits, [*states, state_of(SamplingParams(), vocab_size=41)])
    assert found.token_ids[:2] == [7, 7]
    first, second, third = found.logprobs
    assert first is not None
    assert second is not None
    assert third is None
    assert first.top == ()
    chosen = torch.tensor([first.logprob, second.logprob], dtype=torch.float64)
    torch.testing.assert_close(chosen, expected[:2, 7], rtol=1e-5, atol=1e-5)
    best = expected[1, :41].topk(4)  # probabilities over all rows, names only of the vocabulary
    assert [token_id for token_id, _ in second.top] == best.indices.tolist()
    named = torch.tensor([value for _, value in second.top], dtype=torch.float64)
    torch.testing.assert_close(named, best.values, rtol=1e-5, atol=1e-5)


def test_changes_are_none_where_nothing_is_asked():
    assert state_of(SamplingParams(temperature=1.0, top_p=0.5), vocab_size=9).changes(0) is None
    change = state_of(SamplingParams(min_tokens=1), vocab_size=9, stop_ids=frozenset({3})).changes(0)
    assert change == RowChanges(None, [3], None)
