"""Where rounding could choose a forbidden token: the ends of the random number, and cuts that fall on an edge."""

import math

import pytest
import torch

from internlm2.engine.sampling import filters
from internlm2.engine.sampling.params import SamplingParams

LAST = 1 - 2.0**-53  # the largest random number
FREE = SamplingParams(temperature=1.0)
FILTERED = SamplingParams(temperature=1.0, top_p=1 - 1e-9)


def random_logits(num_rows: int, vocab_size: int, *, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0)) * scale


def draw_all(logits: torch.Tensor, params: SamplingParams, number: float) -> list[int]:
    return filters.draw(logits, [filters.Draw(params, row.max().item(), number) for row in logits])


@pytest.mark.parametrize("vocab_size", [128, 300, 3000])
def test_the_largest_random_number_takes_the_last_possible_token(vocab_size):
    """A block's sum in float32 may exceed the sum of its parts in float64; half of these rows do."""
    logits = random_logits(64, vocab_size)
    logits[:, -7:] = -math.inf
    assert draw_all(logits, FREE, LAST) == [vocab_size - 8] * 64
    assert draw_all(logits, FILTERED, LAST) == [int(row[:-7].argmin()) for row in logits]


@pytest.mark.parametrize("vocab_size", [128, 300, 3000])
def test_the_smallest_random_number_takes_the_first_possible_token(vocab_size):
    logits = random_logits(64, vocab_size)
    logits[:, : vocab_size // 2] = -math.inf
    assert draw_all(logits, FREE, 0.0) == [vocab_size // 2] * 64
    assert draw_all(logits, FILTERED, 0.0) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("scale", [3.0, 30.0])
def test_a_top_p_on_the_edge_of_a_token_is_decided_in_float64(scale):
    """The mass of a long row comes in float32 first; a billionth to either side of an edge it must not decide."""
    logits = random_logits(1, 3000, scale=scale)[0]
    cumulative = logits.double().sort(descending=True).values.softmax(-1).cumsum(-1)
    for rank in range(12):
        edge = cumulative[rank].item()
        if edge > 1 - 1e-6:
            break
        for top_p, num_kept in ((edge * (1 - 1e-9), rank + 1), (edge * (1 + 1e-9), rank + 2)):
            params = SamplingParams(temperature=1.0, top_p=top_p)
            best = logits.argsort(descending=True).tolist()
            assert draw_all(logits[None], params, LAST) == [best[num_kept - 1]]
            assert filters.shortlist(
                logits[None], [filters.Draw(params, logits.max().item(), 0.5)]
            ).is_exact == [False]
