"""Sampling against transformers' own logits processors, and the ranges of every value."""

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from internlm2.engine.sampling.sampler import Sampler, SamplingParams, filtered, penalise
from internlm2.errors import RequestError

VOCAB = 257


def random_logits(seed: int) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.3},
        {"temperature": 1.7},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_k": 40},
        {"temperature": 1.0, "top_k": 1000},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_filters_equal_transformers(values, seed):
    logits = random_logits(seed)
    params = SamplingParams(**values)
    expected = TemperatureLogitsWarper(params.temperature)(None, logits[None])
    if params.top_k:
        expected = TopKLogitsWarper(params.top_k)(None, expected)
    if params.top_p < 1:
        expected = TopPLogitsWarper(params.top_p)(None, expected)
    if params.min_p:
        expected = MinPLogitsWarper(params.min_p)(None, expected)
    torch.testing.assert_close(filtered(logits, params), expected[0])


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.005, 1.3])
def test_the_repetition_penalty_equals_transformers(penalty):
    logits, seen_ids = random_logits(0), torch.tensor([1, 5, 5, 256])
    seen = torch.zeros(VOCAB, dtype=torch.bool)
    seen[seen_ids] = True
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen_ids[None], logits[None].clone())
    torch.testing.assert_close(penalise(logits, seen, penalty), expected[0])


def test_draws_follow_the_distribution():
    """Chi-square over 4000 draws: 16 cells, 99.9 % quantile 37.7."""
    logits = random_logits(1)[:16] / 3
    sampler = Sampler(SamplingParams(temperature=1.0, seed=3), [0], vocab_size=16)
    draws = torch.tensor([sampler.next_token(logits) for _ in range(4000)])
    expected = logits.softmax(-1) * 4000
    chi_square = ((draws.bincount(minlength=16) - expected) ** 2 / expected).sum().item()
    assert chi_square < 37.7


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_told(value, temperature):
    logits = random_logits(0)
    logits[3] = value
    with pytest.raises(RequestError, match="logits are not finite"):
        Sampler(SamplingParams(temperature=temperature), [0], vocab_size=VOCAB).next_token(logits)


def test_a_seed_repeats_and_no_seed_varies():
    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), [0], vocab_size=VOCAB)
        return [sampler.next_token(random_logits(0) / 5) for _ in range(20)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e-40}, "temperature is 1e-40"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 10**23}, "seed is 1000"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 2.0}, "min_p is 2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"stop": ("",)}, "stop is"),
    ],
)
def test_values_outside_their_range_are_refused(values, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**values)
