"""Guesses at the next tokens, which the model then checks many at a time: speculative decoding.

The engine draws every position with its own random number and keeps guesses only where they agree, so a drafter
changes the speed of an answer and never its tokens. `PromptLookup` copies what followed the same words earlier (the
idea of arXiv 2304.04487, as prompt lookup); `DraftModel` asks a smaller model (arXiv 2211.17192). Both keep a purse
for each sequence: a guess costs, an agreed token pays, and who is out of luck saves up before the next try.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import torch

from internlm2.engine.compute.batch import Part, make_batch
from internlm2.engine.compute.page_cache import PageCache
from internlm2.engine.compute.runner import Runner
from internlm2.engine.sampling.sampler import SamplingState, sample
from internlm2.engine.schedule.request import Chunk, Sequence
from internlm2.model.heads import CausalLM

NUM_DRAFT_TOKENS = 8
LONGEST, SHORTEST = 4, 2  # last tokens that are looked up
# In units of a step that computes one token: what checking guesses costs at all, and for each of them. Measured with
# one sequence of the demo model on a CPU (steps of 1 to 9 rows, 2026-11-23). NOTE: torch multiplies one row of float32
# by a matrix at the speed of the memory, and two of them at a third of it.
TRY_COST = 0.15
TRY_COST_FLOAT32 = 1.5
ROW_COST = 0.025
INCOME = 0.015  # of every step: what may be lost on text that never repeats
FIRST_CREDIT = 0.45
MOST_CREDIT = 4.0
MOST_MODEL_COST = 0.5


@dataclass
class Purse:
    """How many tokens a sequence may guess now.

    cost: of each guess, in steps. try_cost: of guessing at all. most: guesses at once. first_credit: what a sequence
    begins with, beside the cost of one try.
    """

    cost: float
    most: int
    try_cost: float = TRY_COST
    first_credit: float = FIRST_CREDIT
    credit: float = field(init=False)
    width: int = field(init=False)

    def __post_init__(self) -> None:
        self.credit = self.try_cost + self.first_credit
        self.width = max(self.most // 2, 1)

    def earn(self) -> None:
        """Note that a step goes by."""
        self.credit = min(self.credit + INCOME, MOST_CREDIT)

    def affordable(self) -> int:
        """Guesses that may be made now."""
        return max(min(self.width, int((self.credit - self.try_cost) / self.cost)), 0)

    def settle(self, num_proposed: int, num_accepted: int) -> None:
        """Pay for the guesses, and be paid for the right ones."""
        gain = num_accepted - self.try_cost - num_proposed * self.cost
        self.credit = min(self.credit + gain, MOST_CREDIT)
        if num_accepted == num_proposed:
            self.width = min(self.width * 2, self.most)
        else:
            self.width = min(num_accepted + 1, self.most)


@dataclass
class _Lookup:
    """What is known of one sequence. after: the last tokens of a place -> the latest position that follows them."""

    purse: Purse
    after: dict[tuple[int, ...], int] = field(default_factory=dict)
    num_indexed: int = 0  # positions that stand in `after`
    found: int | None = None

    def update(self, tokens: list[int]) -> None:
        """Enter the new tokens; O(new tokens)."""
        for position in range(max(self.num_indexed, 1), len(tokens)):
            for length in range(SHORTEST, min(LONGEST, position) + 1):
                self.after[tuple(tokens[position - length : position])] = position
        self.num_indexed = len(tokens)
        self.found = self._find(tokens)

    def _find(self, tokens: list[int]) -> int | None:
        for length in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            position = self.after.get(tuple(tokens[-length:]))
            if position is not None:
                return position
        return None


class PromptLookup:
    """Guesses that a text goes on as it did where its last two to four tokens stood before.

    Costs a dictionary of three entries a token and no computation to speak of. try_cost: see `Purse`.
    """

    def __init__(self, *, num_draft_tokens: int = NUM_DRAFT_TOKENS, try_cost: float = TRY_COST) -> None:
        self._most = num_draft_tokens
        self._try_cost = try_cost
        self._lookups: dict[int, _Lookup] = {}

    def wanted(self, sequence: Sequence) -> int:
        """How many tokens follow the earlier place, and are worth a try."""
        lookup = self._lookups.get(sequence.sequence_id)
        if lookup is None:
            lookup = self._lookups[sequence.sequence_id] = _Lookup(
                Purse(ROW_COST, self._most, self._try_cost)
            )
        lookup.purse.earn()
        lookup.update(sequence.tokens)
        return 0 if lookup.found is None else lookup.purse.affordable()

    def propose(
        self, sequences: Items[Sequence], limits: Items[int], states: Items[SamplingState]
    ) -> list[list[int]]:
        """What followed the earlier place; where that reaches the end, the same round again."""
        return [self._copy(*pair) for pair in zip(sequences, limits, strict=True)]

    def _copy(self, sequence: Sequence, limit: int) -> list[int]:
        start = self._lookups[sequence.sequence_id].found
        assert start is not None
        round_ = len(sequence.tokens) - start
        return [sequence.tokens[start + i % round_] for i in range(limit)]

    def observe(self, chunks: Items[Chunk]) -> None:
        """Nothing to follow: the tokens are all it knows."""

    def accepted(self, sequence: Sequence, *, num_proposed: int, num_accepted: int) -> None:
        """How many of the last guesses were right."""
        self._lookups[sequence.sequence_id].purse.settle(num_proposed, num_accepted)

    def forget(self, sequence: Sequence) -> None:
        """The sequence is finished."""
        self._lookups.pop(sequence.sequence_id, None)


class DraftModel:
    """Guesses with a smaller model of the same vocabulary.

    Its keys and values lie in pages of the same ids as the large model's, so the pages that sequences share are
    shared here too. They follow step by step (`observe`); there is no host memory for them. cache: as many pages of
    the same size as the engine's. cost: of one guess, in steps of the large model.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: PageCache,
        *,
        cost: float,
        num_draft_tokens: int = NUM_DRAFT_TOKENS,
        try_cost: float = TRY_COST,
    ) -> None:
        self._runner = Runner(model, cache)
        self._cost = ROW_COST + min(cost, MOST_MODEL_COST)
        self._most = num_draft_tokens
        self._try_cost = try_cost
        self._purses: dict[int, Purse] = {}

    def wanted(self, sequence: Sequence) -> int:
        """How many guesses are worth a try."""
        purse = self._purses.get(sequence.sequence_id)
        if purse is None:  # someone chose this model, so it is worth a longer try than chance finds
            purse = self._purses[sequence.sequence_id] = Purse(
                self._cost, self._most, self._try_cost, first_credit=MOST_CREDIT
            )
        purse.earn()
        return purse.affordable()

    def propose(
        self, sequences: Items[Sequence], limits: Items[int], states: Items[SamplingState]
    ) -> list[list[int]]:
        """Decode with the small model, each token under the random number that the large one will use."""
        proposals: list[list[int]] = [[] for _ in sequences]
        for index in range(max(limits, default=0)):
            active = [i for i, limit in enumerate(limits) if limit > index]
            last = [proposals[i][-1] if index else sequences[i].tokens[-1] for i in active]
            hidden = self._run(
                self._part(sequences[i], [token], len(sequences[i].tokens) - 1 + index)
                for i, token in zip(active, last, strict=True)
            )
            chosen = _choose(self._runner.logits(hidden), [states[i] for i in active], index)
            for i, token in zip(active, chosen, strict=True):
                proposals[i].append(token)
        return proposals

    def observe(self, chunks: Items[Chunk]) -> None:
        """Compute the keys of this step. Of guesses only the last one's: `propose` has run the others."""
        parts: list[Part] = []
        for chunk in chunks:
            ids = chunk.token_ids
            first = len(ids) - 1 if chunk.drafts else 0
            parts.append(self._part(chunk.sequence, ids[first:], chunk.start + first))
        self._run(parts)

    def accepted(self, sequence: Sequence, *, num_proposed: int, num_accepted: int) -> None:
        """How many of the last guesses were right."""
        self._purses[sequence.sequence_id].settle(num_proposed, num_accepted)

    def forget(self, sequence: Sequence) -> None:
        """The sequence is finished."""
        self._purses.pop(sequence.sequence_id, None)

    def _part(self, sequence: Sequence, ids: list[int], start: int) -> Part:
        assert sequence.pages is not None
        # A prompt may hold ids that only the larger embedding knows; what stands for them does not matter.
        rows = self._runner.model.config.vocab_size
        known = [token if token < rows else 0 for token in ids]
        return Part(known, start, sequence.pages.ids, sequence.length_limit or sequence.max_total_tokens)

    def _run(self, parts: Iterable[Part]) -> torch.Tensor:
        cache = self._runner.cache
        batch = make_batch(parts, page_size=cache.page_size, device=self._runner.device)
        return self._runner.forward(batch)  # (N, C)


def _choose(logits: torch.Tensor, states: Items[SamplingState], index: int) -> list[int]:
    """The guess `index` places on for each row; the likeliest where the true choice depends on what comes before."""
    guesses = logits[:, : states[0].vocab_size].argmax(-1).tolist()
    rows = [row for row, state in enumerate(states) if state.is_stateless and state.params.temperature > 0]
    if rows:
        drawn = sample(
            logits[rows], [states[r] for r in rows], indices=[states[r].num_outputs + index for r in rows]
        )
        for row, token in zip(rows, drawn.token_ids, strict=True):
            guesses[row] = token
    return guesses
