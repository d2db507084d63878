"""Sampling against transformers' own processors, a slow twin in numpy, and the promises to one row among many."""

import math
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
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
from internlm2.engine.sampling.penalties import RowChanges, TokenCounts, apply
from internlm2.engine.sampling.sampler import (
    Constraint,
    Sampled,
    SamplingState,
    non_finite_error,
    nothing_left_error,
    prompt_logprobs,
    sample,
    uniform,
)
from internlm2.errors import RequestError
from reference import slow_sampling

SIZES = [5, 101, 257, 9001]  # below the 256 candidates, just above, and where candidates are sought in blocks
NOT_FINITE, NOTHING_LEFT = str(non_finite_error()), str(nothing_left_error())


def random_logits(seed: int, *shape: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def state_of(
    params: SamplingParams,
    *,
    vocab_size: int,
    prompt: Sequence[int] = (0,),
    outputs: Sequence[int] = (),
    stop_ids: frozenset[int] = frozenset(),
    constraint: Constraint | None = None,
    seed: int = 1,
) -> SamplingState:
    state = SamplingState(
        params, prompt, vocab_size=vocab_size, stop_ids=stop_ids, constraint=constraint, seed=seed
    )
    for token_id in outputs:
        state.push(token_id)
    return state


def changed(logits: torch.Tensor, state: SamplingState) -> torch.Tensor:
    """One row (V,) after everything that comes before the filters."""
    row = logits[None].clone()
    change = state.changes(state.num_outputs)
    if change is not None:
        apply(row, [change])
    return row[0]


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


def chances_of(short: filters.Shortlist, vocab_size: int) -> torch.Tensor:
    """A shortlist of one row as probabilities (V,)."""
    weights = torch.zeros(vocab_size, dtype=torch.float64)
    weights[short.ids[0]] = short.weights[0]
    return weights / weights.sum()


def shortlist(logits: torch.Tensor, params: SamplingParams) -> filters.Shortlist:
    """Of one row (V,), by the fast way."""
    return filters.shortlist(logits[None], [filters.Draw(params, logits.max().item(), 0.5)])


def exact_chances(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """What the draw of one row (V,) comes from, by the way that it takes."""
    short = shortlist(logits, params)
    return chances_of(short if short.is_exact[0] else filters.full_list(logits, params), len(logits))


class OnlyThese:
    """A grammar that allows the same ids at every place."""

    def __init__(self, *ids: int) -> None:
        self.ids = ids
        self.seen: list[int] = []

    def fill(self, bitmask: torch.Tensor) -> None:
        words = np.zeros(len(bitmask), dtype=np.uint32)
        for token_id in self.ids:
            words[token_id // 32] |= np.uint32(1 << token_id % 32)
        bitmask.copy_(torch.from_numpy(words.view(np.int32)))

    def advance(self, token_id: int) -> None:
        self.seen.append(token_id)


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


# --- The fast way against the slow twin -----------------------------------------------------------------------------


def hard_logits(kind: str, vocab_size: int) -> torch.Tensor:
    logits = random_logits(5, vocab_size)
    return {
        "random": logits,
        "flat": torch.zeros(vocab_size),
        "nearly flat": logits * 1e-6,
        "two values": (logits > 0).float() * 2,
        "ties": (logits * 2).round(),
        "signed zeros": (logits * 0).copysign(logits),
        "peaked": logits * 40,
        "huge": logits * 1e4 + 3e5,
        "long tail": -torch.arange(vocab_size).float().roll(vocab_size // 3).log1p(),
        "mostly forbidden": logits.masked_fill(torch.arange(vocab_size) % 17 != 3, -math.inf),
    }[kind]


KINDS = ["random", "flat", "nearly flat", "two values", "ties", "signed zeros", "peaked", "huge", "long tail",
         "mostly forbidden"]  # fmt: skip
HARD = [
    {},
    {"top_k": 3},
    {"top_k": 256},
    {"top_k": 600, "top_p": 0.5},
    {"top_k": 256, "top_p": 0.5, "min_p": 0.3},
    {"top_p": 0.5},
    {"top_p": 0.8, "temperature": 0.7},
    {"top_p": 1 - 1e-6},
    {"top_p": 1 - 1e-9},
    {"min_p": 1e-7},
    {"min_p": 0.5, "temperature": 100.0},
    {"typical_p": 0.3},
    {"typical_p": 0.95, "top_k": 20},
    {"typical_p": 0.7, "top_p": 0.9, "temperature": 0.5},
]


@pytest.mark.parametrize("vocab_size", [1, 31, 256, 1001, 9001])
@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_way_equals_a_full_sort(kind, vocab_size):
    """All filters in one batch; the slow twin takes one row at a time."""
    logits = hard_logits(kind, vocab_size)
    if not bool(logits.isfinite().any()):
        pytest.skip("one id, and it is forbidden")
    all_params = [SamplingParams(**{"temperature": 1.0} | values) for values in HARD]
    for params in all_params[1:]:
        expected = torch.zeros(vocab_size, dtype=torch.float64)
        for token_id, weight in slow_sampling.kept(logits.numpy(), params).items():
            expected[token_id] = weight
        torch.testing.assert_close(
            exact_chances(logits, params), expected / expected.sum(), rtol=1e-9, atol=1e-15
        )
    states = [state_of(p, vocab_size=vocab_size, seed=s) for p in all_params for s in range(5)]
    found = sample(logits.expand(len(states), -1), states)
    assert found.token_ids == [
        slow_sampling.token(logits.numpy(), s.params, uniform(s.seed, 0)) for s in states
    ]


def test_common_filters_need_no_full_sort_and_hard_ones_ask_for_it():
    logits = random_logits(0, 9001)
    for values in ({"top_k": 50}, {"top_p": 0.8, "temperature": 0.5}, {"min_p": 0.05}):
        assert shortlist(logits, SamplingParams(**{"temperature": 1.0} | values)).is_exact == [True]
    for values in ({"top_p": 0.9999}, {"min_p": 1e-6}, {"typical_p": 0.9}, {"top_k": 300, "top_p": 0.5}):
        assert shortlist(logits, SamplingParams(temperature=3.0, **values)).is_exact == [False]


def test_greedy_takes_the_first_of_equal_logits():
    for vocab_size in (5, 128, 9001):
        logits = random_logits(0, vocab_size).round().clamp(max=2)
        state = state_of(SamplingParams(), vocab_size=vocab_size)
        assert sample(logits[None], [state]).token_ids == [int((logits == logits.max()).nonzero()[0, 0])]


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
