"""Choosing tokens: C++ = the plain-torch twin at every instruction level, for all kinds of logits and filters."""

import math

import pytest
import torch

from internlm2.engine.sampling import filters
from internlm2.engine.sampling.params import SamplingParams
from internlm2.kernels import sampling

PARAMS = [
    SamplingParams(**values)
    for values in (
        {"temperature": 1.0},
        {"temperature": 0.3},
        {"temperature": 50.0},
        {"temperature": 0.8, "top_p": 0.8},
        {"temperature": 1.2, "top_p": 0.999},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 10**12},
        {"temperature": 0.7, "min_p": 0.05},
        {"temperature": 1.5, "min_p": 1e-9},
        {"temperature": 2.0, "top_k": 700, "top_p": 0.7, "min_p": 0.01},
    )
]


def logits_of(kind: str, vocab_size: int) -> torch.Tensor:
    logits = 3 * torch.randn(vocab_size)
    if kind == "flat":
        return torch.zeros(vocab_size)
    if kind == "few values":
        return logits.round()
    if kind == "peaked":
        return 40 * logits
    if kind == "mostly excluded":
        return logits.masked_fill(torch.arange(vocab_size) % 23 != 5, -math.inf)
    return logits


def chosen(logits: torch.Tensor, rows: list[int], draws: list[filters.Draw]) -> list[int | None]:
    wants = [
        sampling.wanted(
            temperature=one.params.temperature, top_k=one.params.top_k, top_p=one.params.top_p,
            min_p=one.params.min_p, uniform=one.uniform,
        )
        for one in draws
    ]  # fmt: skip
    return sampling.choose(logits, rows, wants)


def drawn_beside(logits: torch.Tensor, one: filters.Draw) -> set[int]:
    """What the twin takes at the number itself and just beside it: the two sum in different orders."""
    near = {min(max(one.uniform + shift, 0.0), 1 - 2**-53) for shift in (-2e-6, 0.0, 2e-6)}
    return {filters.draw(logits[None], [filters.Draw(one.params, one.top, u)])[0] for u in near}


@pytest.mark.parametrize("vocab_size", [29, 128, 5003])
@pytest.mark.parametrize("kind", ["random", "flat", "few values", "peaked", "mostly excluded"])
def test_kernel_draws_what_the_twin_draws(level: str, kind: str, vocab_size: int) -> None:
    row = logits_of(kind, vocab_size)
    uniforms = [1e-5, 1 - 1e-5, *torch.rand(12, dtype=torch.float64).tolist()]
    draws = [filters.Draw(params, float(row.max()), u) for params in PARAMS for u in uniforms]
    found = chosen(row.expand(len(draws), -1), list(range(len(draws))), draws)
    exact = [filters.draw(row[None], [one])[0] for one in draws]
    # NOTE: only without filters, or very near an edge, may rounding choose a neighbour.
    assert sum(a != b for a, b in zip(found, exact, strict=True)) <= len(draws) // 50
    for token, one in zip(found, draws, strict=True):
        assert token in drawn_beside(row, one)
        assert row[token] > -math.inf


@pytest.mark.parametrize("kind", ["random", "mostly excluded"])
def test_the_ends_of_the_distribution_are_tokens_that_can_be(level: str, kind: str) -> None:
    row = logits_of(kind, 5003)
    for uniform in (0.0, 2**-53, 1 - 2**-53):
        draws = [filters.Draw(params, float(row.max()), uniform) for params in PARAMS]
        for token, params in zip(chosen(row[None], [0] * len(PARAMS), draws), PARAMS, strict=True):
            assert (row[token] - row.max()) / params.temperature > -88


def test_frequencies_are_the_softmax(level: str) -> None:
    row = 2 * torch.randn(300)
    params = SamplingParams(temperature=0.9)
    count = 4096
    draws = [filters.Draw(params, float(row.max()), (i + 0.5) / count) for i in range(count)]
    found = torch.tensor(chosen(row[None], [0] * count, draws))
    expected = (row.double() / 0.9).softmax(-1) * count
    assert (torch.bincount(found, minlength=300) - expected).abs().max() <= 1.01


@pytest.mark.parametrize("vocab_size", [1, 15, 16, 17, 5003])
def test_greedy_is_the_first_of_the_largest(level: str, vocab_size: int) -> None:
    logits = torch.randn(40, vocab_size).round()
    draws = [filters.Draw(SamplingParams(temperature=0), 0.0, 0.0)] * 40
    assert chosen(logits, list(range(40)), draws) == [int((x == x.max()).nonzero()[0, 0]) for x in logits]
    logits = torch.full((1, vocab_size), -0.0)
    logits[0, -1] = 0.0
    assert chosen(logits, [0], draws[:1]) == [0]


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), *PARAMS])
@pytest.mark.parametrize("place", [0, 17, 98])
def test_a_row_that_is_not_finite_has_no_token_and_spoils_no_other(level: str, params, place: int) -> None:
    logits = torch.randn(5, 99)
    logits[1, place], logits[2, place], logits[3] = math.nan, math.inf, -math.inf
    logits[4, place] = -math.inf
    draws = [filters.Draw(params, float(row.max()), 0.3) for row in logits]
    found = chosen(logits, list(range(5)), draws)
    assert found[1:4] == [None, None, None]
    assert (found[0], found[4]) == (
        chosen(logits[:1], [0], draws[:1])[0],
        chosen(logits[4:], [0], draws[4:])[0],
    )
    assert found[4] != place


def test_rows_strides_and_threads_make_no_difference(level: str) -> None:
    wide = 3 * torch.randn(64, 900)
    logits = wide[:, :777]
    draws = [filters.Draw(params, 0.0, float(u)) for params in PARAMS for u in torch.rand(5)]
    rows = [(7 * i) % 64 for i in range(len(draws))]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(chosen(logits, rows, draws))
    finally:
        torch.set_num_threads(before)
    alone = [
        chosen(logits[row : row + 1].clone(), [0], [one])[0] for row, one in zip(rows, draws, strict=True)
    ]
    assert found == [alone] * 3


def test_what_lies_on_the_edge_of_top_p_is_decided_in_float64(level: str) -> None:
    # 1,000 equal tokens: whether the 800th is kept hangs on the last bit of the mass, and 0.8 * 1000 is exact
    row = torch.zeros(1000)
    params = SamplingParams(temperature=1.0, top_p=0.8)
    last = chosen(row[None], [0], [filters.Draw(params, 0.0, 1 - 2**-53)])
    assert last == filters.draw(row[None], [filters.Draw(params, 0.0, 1 - 2**-53)]) == [799]
