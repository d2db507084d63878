"""What the tests of sampling share: logits, states, what a draw comes from, and the hard filters."""

from collections.abc import Sequence

import numpy as np
import torch

from internlm2.engine.sampling import filters
from internlm2.engine.sampling.params import SamplingParams
from internlm2.engine.sampling.penalties import apply
from internlm2.engine.sampling.sampler import Constraint, SamplingState

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
