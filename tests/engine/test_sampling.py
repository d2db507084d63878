"""Sampling against transformers' own processors and warpers, our own penalties, and the laws of chance."""

import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sampling_cases import changed, exact_chances, random_logits, state_of
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from internlm2.engine.sampling import filters
from internlm2.engine.sampling.params import SamplingParams
from internlm2.engine.sampling.penalties import TokenCounts
from internlm2.engine.sampling.sampler import SamplingState, sample, uniform
from internlm2.errors import RequestError

SIZES = [5, 101, 257, 9001]  # below the 256 candidates, just above, and where candidates are sought in blocks


def processed(
    logits: torch.Tensor,
    params: SamplingParams,
    *,
    prompt: Sequence[int],
    outputs: Sequence[int],
    stop_ids: frozenset[int],
) -> torch.Tensor:
    """What transformers makes of logits (V,) before its warpers, in the order of `_get_logits_processor`."""
    steps = LogitsProcessorList()
    if params.logit_bias:
        steps.append(
            SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias.items()})
        )
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.bad_words_ids:
        steps.append(NoBadWordsLogitsProcessor(list(map(list, params.bad_words_ids)), sorted(stop_ids)))
    if params.min_tokens:
        steps.append(MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, sorted(stop_ids)))
    return steps(torch.tensor([[*prompt, *outputs]]), logits[None].clone())[0]


def warped(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """What transformers' warpers make of logits (V,), in float64: in float32 its cumulative sums lose the edges."""
    steps = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    if params.typical_p < 1:
        steps.append(TypicalLogitsWarper(params.typical_p))
    return steps(torch.zeros(1, 1, dtype=torch.long), logits[None].double())[0]


def inverse(scores: torch.Tensor, logits: torch.Tensor, params: SamplingParams, number: float) -> int:
    """The token at `number` of the distribution that scores (V,) stand for; by rank where a filter is on."""
    order = torch.arange(len(scores))
    if filters.is_filtered(params):
        order = logits.sort(descending=True, stable=True).indices
    cumulative = scores.softmax(-1)[order].cumsum(-1)
    return int(order[int((cumulative <= number * cumulative[-1]).sum())])


# --- Against transformers -------------------------------------------------------------------------------------------

FILTERS = [
    {"temperature": 0.3},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 1000},
    {"top_p": 0.8},
    {"top_p": 1e-6},
    {"top_p": 0.9999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"min_p": 1e-9},
    {"typical_p": 0.2},
    {"typical_p": 0.9},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 3.0, "top_k": 400, "top_p": 0.5},
    {"temperature": 3.0, "top_k": 300, "top_p": 0.9, "typical_p": 0.7},
    {"temperature": 0.8, "top_k": 300, "typical_p": 0.7},
    {"temperature": 1.3, "top_p": 0.95, "typical_p": 0.5},
    {"temperature": 1.3, "top_p": 0.95, "min_p": 0.05, "typical_p": 0.5},
]


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("values", FILTERS)
def test_the_distribution_and_the_token_are_those_of_transformers(values, vocab_size):
    params = SamplingParams(**{"temperature": 1.0} | values)
    for seed in range(3):
        logits = random_logits(seed, vocab_size)
        scores = warped(logits, params)
        if filters.is_filtered(params):
            torch.testing.assert_close(
                exact_chances(logits, params), scores.softmax(-1), rtol=1e-10, atol=1e-15
            )
        state = state_of(params, vocab_size=vocab_size, seed=seed)
        found = sample(logits.expand(20, -1), [state] * 20, indices=range(20))
        assert found.token_ids == [inverse(scores, logits, params, uniform(seed, i)) for i in range(20)]


@pytest.mark.parametrize("vocab_size", [101, 9001])
def test_all_that_tie_with_the_last_of_top_k_stay(vocab_size):
    logits = random_logits(0, vocab_size).round()  # about twenty different values
    for top_k in (1, 2, 30, 90, 255, 256, 257, 1000):
        for more in ({}, {"top_p": 1 - 1e-9}, {"typical_p": 0.6}):
            params = SamplingParams(temperature=1.0, top_k=top_k, **more)
            torch.testing.assert_close(
                exact_chances(logits, params), warped(logits, params).softmax(-1), rtol=1e-10, atol=1e-15
            )


@pytest.mark.parametrize("case", range(40))
def test_every_combination_equals_transformers_pipeline(case):
    """Values, prompt and answer are drawn with the seed `case`; the draws themselves are compared, not only sets."""
    chance = np.random.default_rng(case)
    vocab_size = SIZES[case % len(SIZES)]
    stop_ids = frozenset({2, vocab_size - 1})
    prompt = chance.integers(0, vocab_size, 7).tolist()
    outputs = chance.integers(0, vocab_size, int(chance.integers(0, 5))).tolist()
    before = [*prompt, *outputs]

    def maybe(value: object, off: object) -> object:
        return value if chance.random() < 0.6 else off

    params = SamplingParams(
        temperature=float(chance.uniform(0.2, 2.5)),
        top_k=maybe(int(chance.integers(1, 400)), 0),
        top_p=maybe(float(chance.uniform(0.1, 1)), 1.0),
        min_p=maybe(float(chance.uniform(0, 0.1)), 0.0),
        typical_p=maybe(float(chance.uniform(0.1, 1)), 1.0),
        repetition_penalty=maybe(float(chance.uniform(0.5, 2)), 1.0),
        min_tokens=maybe(int(chance.integers(0, 6)), 0),
        logit_bias=maybe({int(chance.integers(vocab_size)): float(chance.uniform(-9, 9)) for _ in "abc"}, {}),
        bad_words_ids=maybe(
            ((2,), (3,), (before[-1], 4), (*before[-3:], 1), (0, 1, 2), tuple(before * 2)), ()
        ),
    )
    logits = random_logits(case, vocab_size)
    state = state_of(
        params, vocab_size=vocab_size, prompt=prompt, outputs=outputs, stop_ids=stop_ids, seed=case
    )
    expected = processed(logits, params, prompt=prompt, outputs=outputs, stop_ids=stop_ids)
    torch.testing.assert_close(changed(logits, state), expected, rtol=0, atol=0)
    scores = warped(expected, params)
    if filters.is_filtered(params):
        torch.testing.assert_close(
            exact_chances(expected, params), scores.softmax(-1), rtol=1e-10, atol=1e-15
        )
    number = uniform(case, len(outputs))
    assert sample(logits[None], [state]).token_ids == [inverse(scores, expected, params, number)]


@pytest.mark.parametrize("penalty", [0.5, 1.005, 1.3])
def test_the_repetition_penalty_equals_transformers(penalty):
    """Ids of the prompt beyond the vocabulary are possible where the embedding has more rows; they count for nothing."""
    logits, params = random_logits(0, 257), SamplingParams(repetition_penalty=penalty)
    for prompt, outputs in (([1, 5, 5, 256], []), ([1, 260], [5, 7, 5, 200]), ([9], list(range(60)))):
        state = state_of(params, vocab_size=257, prompt=prompt, outputs=outputs)
        expected = processed(logits, params, prompt=prompt, outputs=outputs, stop_ids=frozenset())
        torch.testing.assert_close(changed(logits, state), expected, rtol=0, atol=0)


@pytest.mark.parametrize("outputs", [[], [7], [7, 8], [8, 7], [7, 8, 9], [1, 7, 8, 9]])
def test_bad_words_equal_transformers_across_prompt_and_answer(outputs):
    words = ((4,), (2,), (7, 2), (7, 8, 9), (7, 8, 10), (8, 9, 7, 8), (5, 7, 1), (6, 5, 6, 5, 7, 8, 9, 3))
    logits, params = random_logits(0, 33), SamplingParams(bad_words_ids=words)
    for prompt in ([5], [6, 5], [6, 5, 6, 5]):
        given = {"prompt": prompt, "outputs": outputs, "stop_ids": frozenset({2})}
        expected = processed(logits, params, **given)
        torch.testing.assert_close(
            changed(logits, state_of(params, vocab_size=33, **given)), expected, rtol=0, atol=0
        )
    banned = changed(logits, state_of(params, vocab_size=33, prompt=[5], outputs=[7, 8])).isinf()
    assert banned.nonzero()[:, 0].tolist() == [2, 4, 9, 10]  # 2 is banned where it does not end the answer


@pytest.mark.parametrize("num_outputs", range(5))
def test_early_stops_are_held_back_like_in_transformers(num_outputs):
    logits, params = random_logits(0, 33), SamplingParams(min_tokens=3)
    given = {"prompt": [1, 2], "outputs": [4] * num_outputs, "stop_ids": frozenset({0, 32})}
    result = changed(logits, state_of(params, vocab_size=33, **given))
    torch.testing.assert_close(result, processed(logits, params, **given), rtol=0, atol=0)
    assert result.isinf().nonzero()[:, 0].tolist() == ([0, 32] if num_outputs < 3 else [])


# --- Penalties of our own -------------------------------------------------------------------------------------------


def charged(logits: np.ndarray, outputs: Sequence[int], presence: float, frequency: float) -> np.ndarray:
    """OpenAI's definition: mu[j] - c[j] * frequency - (c[j] > 0) * presence."""
    counts = np.bincount(np.array(outputs, dtype=np.int64), minlength=len(logits))
    return logits - counts * frequency - (counts > 0) * presence


@pytest.mark.parametrize(("presence", "frequency"), [(0.5, 0), (0, 0.7), (1.5, -0.3), (-2, 2)])
def test_presence_and_frequency_penalties_count_the_answer_alone(presence, frequency):
    logits = random_logits(0, 257)
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
    outputs = np.random.default_rng(0).integers(0, 40, 100).tolist()
    for length in (0, 1, 9, 100):
        state = state_of(params, vocab_size=257, prompt=[3, 3, 4], outputs=outputs[:length])
        expected = charged(logits.double().numpy(), outputs[:length], presence, frequency)
        torch.testing.assert_close(
            changed(logits, state), torch.from_numpy(expected).float(), rtol=1e-6, atol=1e-6
        )


def test_token_counts_hold_every_token_once():
    ids = np.random.default_rng(1).integers(0, 50, 500).tolist()
    counts = TokenCounts(ids[:20])
    for token_id in ids[20:]:
        counts.add(token_id)
    assert dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True)) == {
        token_id: ids.count(token_id) for token_id in set(ids)
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"logit_bias": {33: 1.0}}, "logit_bias holds 33, but ids go from 0 to 32."),
        ({"bad_words_ids": ((1, 40),)}, "bad_words_ids holds 40, but ids go from 0 to 32."),
    ],
)
def test_ids_outside_the_vocabulary_are_refused_with_the_range(values, message):
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        state_of(SamplingParams(**values), vocab_size=33)


def test_bad_words_of_the_caller_are_checked_and_obeyed_too():
    logits = random_logits(0, 33)
    state = SamplingState(
        SamplingParams(), [1], vocab_size=33, bad_words_ids=[[int(logits.argmax())]], seed=0
    )
    assert sample(logits[None], [state]).token_ids == [int(logits.topk(2).indices[1])]
    with pytest.raises(RequestError, match="bad_words_ids holds 33"):
        SamplingState(SamplingParams(), [1], vocab_size=33, bad_words_ids=[[33]], seed=0)


# --- Chance ---------------------------------------------------------------------------------------------------------


def test_the_random_number_is_the_one_that_is_documented():
    """Computed once with hashlib by hand; another law would change every seeded answer."""
    assert uniform(0, 0) == 0.0564663990004608
    assert uniform(2**63 - 1, 12345) == 0.1811036175971703
    assert uniform(2**64 - 1, 2**64 - 1) == 0.15441467538695053


@pytest.mark.parametrize(
    ("values", "vocab_size"),
    [({}, 16), ({"top_p": 0.9}, 16), ({"top_k": 12}, 300), ({"typical_p": 0.9}, 16), ({"min_p": 0.2}, 9001)],
)
def test_draws_follow_the_distribution(values, vocab_size):
    """Chi-square over 8000 draws: at most 16 cells, 99.9 % quantile of 15 degrees 37.7."""
    logits = random_logits(1, vocab_size, scale=1.0)
    logits[16:] -= 8  # too rare for a cell of their own, or cut
    params = SamplingParams(temperature=1.0, **values)
    state = state_of(params, vocab_size=vocab_size, seed=3)
    tokens = sample(logits.expand(8000, -1), [state] * 8000, indices=range(8000)).token_ids
    expected = warped(logits, params).softmax(-1) * 8000
    counts = torch.tensor(tokens).bincount(minlength=vocab_size).double()
    assert bool((counts[expected == 0] == 0).all())
    cells = expected > 0
    assert int(cells.sum()) <= 16
    chi_square = ((counts - expected)[cells] ** 2 / expected[cells]).sum().item()
    assert 0.5 < chi_square < 37.7


def test_a_seed_repeats_and_another_seed_varies():
    logits, params = random_logits(0, 257, scale=0.5), SamplingParams(temperature=1.0)

    def draws(seed: int) -> list[int]:
        state = state_of(params, vocab_size=257, seed=seed)
        return sample(logits.expand(20, -1), [state] * 20, indices=range(20)).token_ids

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
