"""From logits to the next token of many sequences at once.

Steps: penalties, bad words, early stops and grammars (`penalties.py`), then temperature and filters (`filters.py`).
Chance: token i of a sequence with seed s takes one number u, the first 53 bits of blake2b(s, i) (8 bytes each, little
end first) as a fraction in [0, 1), and becomes the inverse of the cumulative distribution at u. So an answer depends
on its logits, its parameters and its seed alone: not on its neighbours in the batch, on a preemption, or on how many
positions are sampled in one call.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from internlm2.engine.sampling import filters
from internlm2.engine.sampling.params import SamplingParams
from internlm2.engine.sampling.penalties import Broken, Constraint, Penalties, RowChanges, apply
from internlm2.errors import RequestError
from internlm2.kernels import sampling as kernel

__all__ = [
    "Constraint",
    "Sampled",
    "SamplingState",
    "TokenLogprobs",
    "non_finite_error",
    "nothing_left_error",
    "prompt_logprobs",
    "sample",
    "uniform",
]

LOGPROB_ROWS = 16  # rows of logits that are turned into log-probabilities at a time


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) of output `index` under `seed`, both from 0 to 2^64 - 1."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, index), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def non_finite_error() -> RequestError:
    """What a request is told whose logits hold NaN or infinity."""
    return RequestError(
        "The model's logits are not finite, so no token can be chosen. In float16 values overflow easily: "
        "try bfloat16 or float32. Otherwise the weights are damaged."
    )


def nothing_left_error() -> RequestError:
    """What a request is told whose grammar and bad words forbid every token."""
    return RequestError(
        "No token is allowed here: the grammar, bad words and min_tokens of this request exclude each other. "
        "Loosen one of them."
    )


class SamplingState:
    """What choosing the tokens of ONE sequence needs to remember. What is off costs nothing.

    prompt_ids: what the model was given. vocab_size: ids from here on are never chosen; an embedding may have more
    rows than the tokenizer has tokens. stop_ids: all ids that end this answer. bad_words_ids: those of
    `params.bad_words`, besides `params.bad_words_ids`. seed: from 0 to 2^64 - 1; the caller draws one where
    `params.seed` is None. Raises RequestError for ids of params outside the vocabulary.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        vocab_size: int,
        stop_ids: frozenset[int] = frozenset(),
        bad_words_ids: Sequence[Sequence[int]] = (),
        constraint: Constraint | None = None,
        seed: int,
    ) -> None:
        self.params = params
        self.vocab_size = vocab_size
        self.seed = seed
        self.constraint = constraint
        self.num_outputs = 0
        self.stop_ids = stop_ids
        penalties = Penalties(
            params, prompt_ids, vocab_size=vocab_size, stop_ids=stop_ids, bad_words_ids=bad_words_ids
        )
        self._penalties = None if penalties.is_off else penalties

    @property
    def is_stateless(self) -> bool:
        """Whether a token's distribution depends on its logits and index alone: several may go in one call."""
        is_free = self._penalties is None or self._penalties.is_stateless
        return is_free and self.constraint is None and not self._too_early(self.num_outputs)

    def push(self, token_id: int) -> None:
        """Remember a token of the answer. A grammar that fails here is told of when the next token is due."""
        self.num_outputs += 1
        if self._penalties is not None:
            self._penalties.push(token_id)
        if self.constraint is not None:
            try:
                self.constraint.advance(token_id)
            except RequestError as error:
                self.constraint = Broken(error)

    def changes(self, index: int) -> RowChanges | None:
        """What happens to the logits of output `index` before it is drawn; None for nothing."""
        too_early = self._too_early(index)
        if self._penalties is None and self.constraint is None and not too_early:
            return None
        return RowChanges(self._penalties, too_early, self.constraint)

    def _too_early(self, index: int) -> Sequence[int]:
        if index >= self.params.min_tokens:
            return ()
        return sorted(token for token in self.stop_ids if token < self.vocab_size)


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities of the model itself: log-softmax of its logits, before penalties and temperature.

    logprob: of the token in question. top: ids and log-probabilities of the most likely tokens, best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Sampled:
    """One entry for each row.

    token_ids: 0, which means nothing, where the row failed. logprobs: None where not asked for. errors: why it failed.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    errors: list[RequestError | None]

    @property
    def failed(self) -> list[bool]:
        """Which rows have no token."""
        return [error is not None for error in self.errors]


def sample(
    logits: torch.Tensor, states: Sequence[SamplingState], *, indices: Sequence[int] | None = None
) -> Sampled:
    """Choose a token for each row; nothing is pushed, and the logits stay as they are.

    logits: (R, at least vocab_size) float32. states: of each row's sequence, all with the same vocab_size; a
    stateless one may stand for several rows. indices: the output index of each row, by default the next one.
    A row fails, without disturbing the others, when its logits are not finite, no token is allowed or its grammar
    fails.
    """
    if not states:
        return Sampled([], [], [])
    vocab_size = states[0].vocab_size
    assert len(logits) == len(states)
    assert logits.shape[1] >= vocab_size
    assert all(state.vocab_size == vocab_size for state in states)
    indices = [state.num_outputs for state in states] if indices is None else indices
    pairs = list(zip(states, indices, strict=True))
    assert all(index == state.num_outputs or state.is_stateless for state, index in pairs)
    raw = logits[:, :vocab_size]
    tokens: list[int] = [0] * len(pairs)
    errors: list[RequestError | None] = [None] * len(pairs)
    changes = [state.changes(index) for state, index in pairs]
    as_is = [row for row, change in enumerate(changes) if change is None]
    for row, token in zip(as_is, _choose(raw, as_is, pairs), strict=True):
        tokens[row], errors[row] = token or 0, non_finite_error() if token is None else None
    changed = [row for row, change in enumerate(changes) if change is not None]
    if changed:
        mine = raw.index_select(0, torch.tensor(changed, device=raw.device))  # a copy: the caller's stay
        is_finite = mine.amax(-1).isfinite().tolist()
        broken = apply(mine, [change for change in changes if change is not None])
        found = _choose(mine, range(len(changed)), [pairs[row] for row in changed])
        for place, (row, token) in enumerate(zip(changed, found, strict=True)):
            if not is_finite[place]:
                errors[row] = non_finite_error()
            elif place in broken or token is None:
                errors[row] = broken.get(place) or nothing_left_error()
            else:
                tokens[row] = token
    return Sampled(tokens, _chosen_logprobs(logits, states, tokens, errors), errors)


def _choose(
    logits: torch.Tensor, rows: Sequence[int], pairs: Sequence[tuple[SamplingState, int]]
) -> list[int | None]:
    """Tokens of some rows of logits (R, V); None where the largest logit is not finite. pairs: of all R rows."""
    if not rows:
        return []
    if not kernel.is_available(logits):
        return _choose_by_torch(logits, rows, pairs)
    fast = [row for row in rows if pairs[row][0].params.typical_p >= 1]
    slow = [row for row in rows if pairs[row][0].params.typical_p < 1]
    found = dict(zip(fast, kernel.choose(logits, fast, [_wanted(*pairs[row]) for row in fast]), strict=True))
    found.update(zip(slow, _choose_by_torch(logits, slow, pairs), strict=True))
    return [found[row] for row in rows]


def _wanted(state: SamplingState, index: int) -> bytes:
    params = state.params
    return kernel.wanted(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        uniform=uniform(state.seed, index) if params.temperature > 0 else 0.0,
    )


def _choose_by_torch(
    logits: torch.Tensor, rows: Sequence[int], pairs: Sequence[tuple[SamplingState, int]]
) -> list[int | None]:
    if not rows:
        return []
    logits = filters.select_rows(logits, rows)
    tops, best = filters.best(logits)
    tokens = [token if math.isfinite(top) else None for top, token in zip(tops, best, strict=True)]
    draws: dict[int, filters.Draw] = {}
    for place, (row, top) in enumerate(zip(rows, tops, strict=True)):
        state, index = pairs[row]
        if state.params.temperature > 0 and math.isfinite(top):
            draws[place] = filters.Draw(state.params, top, uniform(state.seed, index))
    if draws:
        found = filters.draw(filters.select_rows(logits, list(draws)), list(draws.values()))
        for place, token in zip(draws, found, strict=True):
            tokens[place] = token
    return tokens


def prompt_logprobs(
    logits: torch.Tensor, targets: Sequence[int], top: int, *, vocab_size: int | None = None
) -> list[TokenLogprobs]:
    """What the model thought of tokens that are given: logits (R, V) of the positions before them, targets R ids.

    top: how many of the most likely ids to name. vocab_size: name none from here on; None: V. The probabilities are
    over all V columns.
    """
    results: list[TokenLogprobs] = []
    for first in range(0, len(targets), LOGPROB_ROWS):
        rows = logits[first : first + LOGPROB_ROWS].float()
        ids = torch.tensor(targets[first : first + LOGPROB_ROWS], device=logits.device)[:, None]
        totals = _log_mass(rows)
        chosen = (rows.gather(1, ids) - totals)[:, 0].tolist()
        named = rows[:, :vocab_size].topk(min(top, vocab_size or rows.shape[1]))
        values = (named.values - totals).tolist()
        for logprob, *columns in zip(chosen, named.indices.tolist(), values, strict=True):
            results.append(TokenLogprobs(logprob, tuple(zip(*columns, strict=True))))
    return results


def _log_mass(rows: torch.Tensor) -> torch.Tensor:
    """Logarithm of the sum of exponentials of each row, with the same bits in any company. rows: (R, V) -> (R, 1)."""
    # NOTE: torch shares out the sum of a lone long row over its threads, and then rounds it differently.
    at_least_two = rows.expand(2, -1) if len(rows) == 1 else rows
    return at_least_two.logsumexp(-1, keepdim=True)[: len(rows)]


def _chosen_logprobs(
    logits: torch.Tensor,
    states: Sequence[SamplingState],
    tokens: Sequence[int],
    errors: Sequence[RequestError | None],
) -> list[TokenLogprobs | None]:
    """Those of the rows that ask for them and did not fail."""
    wanted = {row: state.params.logprobs for row, state in enumerate(states) if errors[row] is None}
    counts = {row: count for row, count in wanted.items() if count is not None}
    results: list[TokenLogprobs | None] = [None] * len(states)
    if counts:
        found = prompt_logprobs(
            filters.select_rows(logits, list(counts)),
            [tokens[row] for row in counts],
            max(counts.values()),
            vocab_size=states[0].vocab_size,
        )
        for (row, count), one in zip(counts.items(), found, strict=True):
            results[row] = TokenLogprobs(one.logprob, one.top[:count])
    return results
