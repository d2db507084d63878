"""The fast way to choose a token against a slow twin in numpy, on logits and filters that are hard."""

import math

import pytest
import torch
from sampling_cases import HARD, exact_chances, random_logits, shortlist, state_of

from internlm2.engine.sampling.params import SamplingParams
from internlm2.engine.sampling.sampler import sample, uniform
from internlm2.kernels import sampling
from reference import slow_sampling


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


@pytest.fixture(params=["C++", "torch"])
def way(request, monkeypatch):
    """Whether the kernel chooses, where there is one, or plain torch."""
    if request.param == "torch":
        monkeypatch.setattr(sampling, "is_available", lambda _: False)


@pytest.mark.parametrize("vocab_size", [1, 31, 256, 1001, 9001])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("way")
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


@pytest.mark.usefixtures("way")
def test_greedy_takes_the_first_of_equal_logits():
    for vocab_size in (5, 128, 9001):
        logits = random_logits(0, vocab_size).round().clamp(max=2)
        state = state_of(SamplingParams(), vocab_size=vocab_size)
        assert sample(logits[None], [state]).token_ids == [int((logits == logits.max()).nonzero()[0, 0])]
