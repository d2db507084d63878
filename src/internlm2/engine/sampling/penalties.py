"""What pushes single logits up, down or out before a token is drawn, in transformers' order.

Bias, repetition penalty, presence and frequency penalty, bad words and early stops, then the mask of a grammar.
A sequence keeps only the ids that it concerns; all rows of a step are changed together.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from internlm2.engine.sampling.params import SamplingParams
from internlm2.errors import RequestError

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]


class Constraint(Protocol):
    """A grammar that an answer obeys. Both methods may raise RequestError, which ends this answer alone."""

    def fill(self, bitmask: torch.Tensor) -> None:
        """Write the allowed tokens into one row: (ceil(V / 32),) int32, bit i of word w stands for id 32 w + i."""
        ...

    def advance(self, token_id: int) -> None:
        """Go on behind a token that was chosen."""
        ...


class Broken:
    """The constraint of an answer whose grammar failed: tells why when the next token is due."""

    def __init__(self, error: RequestError) -> None:
        self._error = error

    def fill(self, bitmask: torch.Tensor) -> None:
        """Raise the error."""
        raise self._error

    def advance(self, token_id: int) -> None:
        """Nothing is left to follow."""


class TokenCounts:
    """How often each token was seen: two arrays side by side that grow by doubling."""

    def __init__(self, ids: Sequence[int] = ()) -> None:
        self._ids, counts = np.unique(np.asarray(ids, dtype=np.int64), return_counts=True)
        self._counts: Values = counts.astype(np.float32)
        self._slots = {token: slot for slot, token in enumerate(self._ids.tolist())}

    def add(self, token_id: int) -> None:
        """Count one more."""
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._ids):
            more = max(8, slot)
            self._ids = np.concatenate((self._ids, np.zeros(more, np.int64)))
            self._counts = np.concatenate((self._counts, np.zeros(more, np.float32)))
        self._ids[slot] = token_id
        self._counts[slot] += 1

    @property
    def ids(self) -> Ids:
        """The ids seen, each once (n,)."""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> Values:
        """How often (n,)."""
        return self._counts[: len(self._slots)]


class Penalties:
    """What the penalties of one sequence need to know; nothing for those that are off.

    bad_words_ids: besides those of the params. stop_ids: a bad word of one such id is ignored, as in transformers.
    Raises RequestError for ids outside the vocabulary.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        vocab_size: int,
        stop_ids: frozenset[int],
        bad_words_ids: Sequence[Sequence[int]],
    ) -> None:
        words = [*params.bad_words_ids, *bad_words_ids]
        check_ids("logit_bias", params.logit_bias, vocab_size=vocab_size)
        for word in words:
            check_ids("bad_words_ids", word, vocab_size=vocab_size)
        self.params = params
        self.bias_ids: Ids = np.array(list(params.logit_bias), dtype=np.int64)
        self.bias: Values = np.array(list(params.logit_bias.values()), dtype=np.float32)
        self.banned: Ids = np.unique([w[0] for w in words if len(w) == 1 and w[0] not in stop_ids]).astype(
            np.int64
        )
        self.seen: TokenCounts | None = None  # in prompt and answer
        if params.repetition_penalty != 1:
            self.seen = TokenCounts([token for token in prompt_ids if token < vocab_size])
        self.said: TokenCounts | None = None  # in the answer
        if params.presence_penalty or params.frequency_penalty:
            self.said = TokenCounts()
        self._endings: dict[
            tuple[int, ...], list[int]
        ] = {}  # beginnings of bad words -> what must not follow
        for *beginning, last in (word for word in words if len(word) > 1):
            self._endings.setdefault(tuple(beginning), []).append(last)
        self._lengths = sorted(set(map(len, self._endings)))
        longest = max(self._lengths, default=0)
        self._tail = deque(prompt_ids[-longest:] if longest else (), maxlen=longest)

    @property
    def is_off(self) -> bool:
        """Whether no logit is ever changed."""
        return self.is_stateless and not len(self.bias_ids) and not len(self.banned)

    @property
    def is_stateless(self) -> bool:
        """Whether the same logits change in the same way, whatever was said."""
        return self.seen is None and self.said is None and not self._endings

    def push(self, token_id: int) -> None:
        """Remember a token of the answer."""
        for counts in (self.seen, self.said):
            if counts is not None:
                counts.add(token_id)
        self._tail.append(token_id)

    def forbidden(self) -> Iterator[Ids]:
        """Ids that must not come next."""
        yield self.banned
        tail = tuple(self._tail)
        for length in self._lengths:
            yield np.array(self._endings.get(tail[-length:], []), dtype=np.int64)


@dataclass(frozen=True)
class RowChanges:
    """What happens to one row of logits. too_early: ids that would end the answer before its time."""

    penalties: Penalties | None
    too_early: Sequence[int] = ()
    constraint: Constraint | None = None


def apply(logits: torch.Tensor, changes: Sequence[RowChanges]) -> dict[int, RequestError]:
    """Change logits (R, V) float32 in place, one `RowChanges` for each row; returns what is wrong with which row."""
    active = [(row, one.penalties) for row, one in enumerate(changes) if one.penalties is not None]
    cells = _cells(logits, [(row, p.bias_ids, p.bias) for row, p in active])
    if cells is not None:
        at, bias = cells
        logits[at] = logits[at] + bias
    cells = _cells(
        logits, [(r, p.seen.ids, p.params.repetition_penalty) for r, p in active if p.seen is not None]
    )
    if cells is not None:
        at, penalty = cells
        found = logits[at]
        logits[at] = torch.where(found < 0, found * penalty, found / penalty)
    cells = _cells(logits, [(row, p.said.ids, _charge(p, p.said)) for row, p in active if p.said is not None])
    if cells is not None:
        at, charge = cells
        logits[at] = logits[at] - charge
    forbidden = [(row, ids, 0.0) for row, p in active for ids in p.forbidden()]
    forbidden += [
        (row, np.array(one.too_early, np.int64), 0.0) for row, one in enumerate(changes) if one.too_early
    ]
    cells = _cells(logits, forbidden)
    if cells is not None:
        logits[cells[0]] = -math.inf
    return _constrain(
        logits, {row: c.constraint for row, c in enumerate(changes) if c.constraint is not None}
    )


def _charge(penalties: Penalties, said: TokenCounts) -> Values:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, as OpenAI's API defines it."""
    return penalties.params.presence_penalty + penalties.params.frequency_penalty * said.counts


def _cells(
    logits: torch.Tensor, parts: Sequence[tuple[int, Ids, Values | float]]
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """(row, ids, a value for each or for all) -> index into logits and values (n,); None when there are no ids."""
    parts = [part for part in parts if len(part[1])]
    if not parts:
        return None
    rows = np.repeat([row for row, _, _ in parts], [len(ids) for _, ids, _ in parts])
    ids = np.concatenate([ids for _, ids, _ in parts])
    values = np.concatenate([np.broadcast_to(np.float32(value), ids.shape) for _, ids, value in parts])
    tensors = [torch.from_numpy(array).to(logits.device) for array in (rows, ids, values)]
    return (tensors[0], tensors[1]), tensors[2]


def _constrain(logits: torch.Tensor, constraints: Mapping[int, Constraint]) -> dict[int, RequestError]:
    errors: dict[int, RequestError] = {}
    if not constraints:
        return errors
    vocab_size = logits.shape[1]
    masks = torch.zeros(len(constraints), -(-vocab_size // 32), dtype=torch.int32)
    for mask, (row, constraint) in zip(masks, constraints.items(), strict=True):
        try:
            constraint.fill(mask)
        except RequestError as error:
            errors[row] = error
    octets = masks.view(torch.uint8).to(logits.device)  # (R', 4 ceil(V / 32)), lowest bits first
    bits = (octets[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=logits.device)) & 1
    allowed = bits.flatten(1)[:, :vocab_size].bool()  # (R', V)
    rows = torch.tensor(list(constraints), device=logits.device)
    logits[rows] = logits[rows].masked_fill(~allowed, -math.inf)
    return errors


def check_ids(name: str, ids: Iterable[int], *, vocab_size: int) -> None:
    """Raise RequestError for ids outside the vocabulary; `name` is what holds them."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise RequestError(f"{name} holds {token}, but ids go from 0 to {vocab_size - 1}.")
