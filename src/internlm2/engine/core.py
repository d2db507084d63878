"""The engine: sequences in, updates out, one step at a time. Tokens only; text is the business of `text.py`.

A step asks the scheduler what to compute, runs the network once, and reads off what each sequence wants: its next
token, log-probabilities of its prompt, a mean of hidden states, or a reward.
"""

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from internlm2.engine.compute.batch import Part, make_batch
from internlm2.engine.compute.runner import Runner
from internlm2.engine.sampling.sampler import (
    Sampled,
    SamplingState,
    TokenLogprobs,
    prompt_logprobs,
    sample,
)
from internlm2.engine.schedule.request import Chunk, Sequence, Task
from internlm2.engine.schedule.scheduler import Scheduler
from internlm2.errors import InternLM2Error

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Update:
    """What one step brought to one sequence.

    token_ids: new tokens, without one that stops the answer. logprobs: one for each, where asked for.
    finish_reason: None while it goes on; "error" comes with `error`. prompt_logprobs: with the last update of a
    sequence that wanted them, one for each prompt token after `logits_from`, then one for each alternative. vector:
    the embedding (C,) or the reward (1,), float32.
    """

    sequence: Sequence
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: InternLM2Error | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    vector: torch.Tensor | None = None


@dataclass
class Stats:
    """Counters since the engine began. network_seconds: the part of step_seconds spent in the model."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    num_preemptions: int = 0
    step_seconds: float = 0.0
    network_seconds: float = 0.0


class Drafter(Protocol):
    """Proposes tokens that a sequence may go on with (speculative decoding)."""

    def propose(
        self, sequences: Items[Sequence], limits: Items[int], states: Items[SamplingState]
    ) -> list[list[int]]:
        """At most `limits[i]` tokens for each decoding sequence; pages for them are there already."""
        ...

    def observe(self, chunks: Items[Chunk]) -> None:
        """The step that is about to run, for drafters with keys and values of their own."""
        ...

    def accepted(self, sequence: Sequence, *, num_proposed: int, num_accepted: int) -> None:
        """How many of the last proposals were right."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """The sequence is finished."""
        ...

    def wanted(self, sequence: Sequence) -> int:
        """How many tokens it would propose now; 0 keeps the step plain."""
        ...


@dataclass(eq=False)
class _Live:
    """A sequence with what the engine knows of it. top: how many best tokens each prompt log-probability lists."""

    sequence: Sequence
    sampling: SamplingState | None
    max_outputs: int
    top: int | None
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    hidden_sum: torch.Tensor | None = None


class Engine:
    """Steps sequences through the network. Not for several threads at once; see `frontend.py`.

    vocab_size: how many ids the tokenizer has, where the embedding has more rows.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        vocab_size: int | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.stats = Stats()
        self._vocab_size = vocab_size
        self._drafter = drafter
        self._live: dict[int, _Live] = {}

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work

    def add(
        self, sequence: Sequence, sampling: SamplingState | None = None, *, top: int | None = None
    ) -> None:
        """Take a sequence. sampling: for Task.GENERATE. top: list so many best tokens with each prompt token."""
        assert (sampling is not None) == (sequence.task is Task.GENERATE)
        max_outputs = sequence.max_total_tokens - sequence.num_prompt
        self._live[sequence.sequence_id] = _Live(sequence, sampling, max_outputs, top)
        self.scheduler.add(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Let a sequence go at any time; finished ones are ignored."""
        if self._live.pop(sequence.sequence_id, None) is not None:
            self.scheduler.finish(sequence)
            if self._drafter is not None:
                self._drafter.forget(sequence)

    def prompt_logprobs(self, sequence: Sequence) -> tuple[TokenLogprobs, ...] | None:
        """Those of a sequence that is not finished, for who finishes it; None where not asked for."""
        return _in_order(self._live[sequence.sequence_id])

    def step(self) -> list[Update]:
        """Compute the next step. Whatever interrupts it, the sequences can go on afterwards."""
        started = time.perf_counter()
        try:
            updates = self._step()
        except BaseException:
            self.scheduler.restart()  # what is in the pages now is not certain
            raise
        self.stats.num_steps += 1
        self.stats.step_seconds += time.perf_counter() - started
        return updates

    def _step(self) -> list[Update]:
        self._draft()
        plan = self.scheduler.schedule()
        self.stats.num_preemptions += len(plan.preempted)
        if not plan.chunks:
            return []
        batch = make_batch(
            (self._part(chunk) for chunk in plan.chunks),
            page_size=self.scheduler.pool.page_size,
            device=self.runner.device,
        )
        started = time.perf_counter()
        self.runner.move(plan.moves)
        if self._drafter is not None:
            self._drafter.observe(plan.chunks)
        hidden = self.runner.forward(batch)  # (N, C)
        self.stats.network_seconds += time.perf_counter() - started
        return self._read(plan.chunks, hidden)

    def _part(self, chunk: Chunk) -> Part:
        sequence = chunk.sequence
        assert sequence.pages is not None
        ids = chunk.token_ids
        limits: int | list[int] = sequence.length_limit or sequence.max_total_tokens
        if self.runner.model.rope_mode == "reference":
            # As the official code: the prompt in one pass, then a base that follows the length.
            whole = sequence.num_prompt + bool(sequence.alternatives)
            limits = [max(whole, p + 1) for p in range(chunk.start, chunk.start + len(ids))]
        return Part(ids, chunk.start, sequence.pages.ids, limits, sequence.adapter)

    # -- reading the results ------------------------------------------------------------------------------

    def _read(self, chunks: list[Chunk], hidden: torch.Tensor) -> list[Update]:
        updates: list[Update] = []
        choosing: list[
            tuple[Chunk, int]
        ] = []  # chunks whose next token is due, and the row of their last token
        row = 0
        for chunk in chunks:
            num_rows = chunk.num_tokens + len(chunk.drafts)
            rows = hidden[row : row + num_rows]
            live = self._live[chunk.sequence.sequence_id]
            self._count(chunk)
            if live.top is not None and chunk.start < chunk.sequence.num_prompt:
                self._read_prompt(live, chunk, rows)
            if chunk.sequence.task is Task.GENERATE:
                if chunk.reaches_end:
                    choosing.append((chunk, row + chunk.num_tokens - 1))
                else:
                    self.scheduler.computed(chunk, [])
            else:
                updates += self._read_off(live, chunk, rows)
            row += num_rows
        return updates + (self._choose(choosing, hidden) if choosing else [])

    def _count(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        if chunk.start == sequence.num_cached and sequence.num_outputs == 0:
            self.stats.num_cached_tokens += sequence.num_cached
        self.stats.num_prompt_tokens += chunk.num_tokens if sequence.num_outputs == 0 else 0
        self.stats.num_drafted_tokens += len(chunk.drafts)

    def _read_prompt(self, live: _Live, chunk: Chunk, rows: torch.Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow the positions of this chunk. rows: (T, C)."""
        sequence = live.sequence
        assert live.top is not None
        first = max(chunk.start, sequence.logits_from or 0)
        last = min(chunk.start + chunk.num_tokens, sequence.num_prompt - 1)
        for begin in range(first, last, 64):  # logits of a few rows at a time
            positions = range(begin, min(begin + 64, last))
            logits = self._logits(rows[begin - chunk.start : positions.stop - chunk.start])
            targets = [sequence.tokens[p + 1] for p in positions]
            found = prompt_logprobs(logits, targets, live.top, vocab_size=self._vocab_size)
            live.prompt_logprobs.update(zip(positions, found, strict=True))
        if sequence.alternatives and chunk.reaches_end:
            logits = self._logits(rows[last - chunk.start :][:1]).expand(len(sequence.alternatives), -1)
            found = prompt_logprobs(logits, sequence.alternatives, live.top, vocab_size=self._vocab_size)
            live.prompt_logprobs.update(enumerate(found, last))
        if chunk.start + chunk.num_tokens >= sequence.num_prompt:
            sequence.logits_from = (
                None  # computed again after a preemption, the prompt may come from the cache
            )

    def _read_off(self, live: _Live, chunk: Chunk, rows: torch.Tensor) -> list[Update]:
        """Tasks that read something off the prompt and end with it. rows: (T, C)."""
        sequence = chunk.sequence
        vector: torch.Tensor | None = None
        if sequence.task is Task.EMBED:
            total = rows.float().sum(0)
            live.hidden_sum = (
                total if chunk.start == 0 or live.hidden_sum is None else live.hidden_sum + total
            )
            vector = live.hidden_sum / sequence.num_prompt
        elif sequence.task is Task.REWARD and chunk.reaches_end:
            vector = self.runner.values(rows[-1:])
        self.scheduler.computed(chunk, [])
        if not chunk.reaches_end:
            return []
        self.finish(sequence)
        return [Update(sequence, finish_reason="length", vector=vector, prompt_logprobs=_in_order(live))]

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        started = time.perf_counter()
        logits = self.runner.logits(rows)
        self.stats.network_seconds += time.perf_counter() - started
        return logits

    # -- choosing tokens ----------------------------------------------------------------------------------

    def _choose(self, choosing: list[tuple[Chunk, int]], hidden: torch.Tensor) -> list[Update]:
        """Choose what follows each chunk; with drafts, as many tokens as agree with them and one more."""
        wanted = [row + extra for chunk, row in choosing for extra in range(len(chunk.drafts) + 1)]
        logits = self._logits(hidden if len(wanted) == len(hidden) else hidden[wanted])  # (R, V)
        states: list[SamplingState] = []
        indices: list[int] = []
        rows: list[int] = []
        first_rows: list[int] = []  # of each chunk, in `logits`
        at = 0
        for chunk, _ in choosing:
            state = self._state(chunk.sequence)
            first_rows.append(at)
            # Without memory of what came before, all rows of a sequence can be sampled at once.
            count = len(chunk.drafts) + 1 if state.is_stateless else 1
            states += [state] * count
            indices += range(state.num_outputs, state.num_outputs + count)
            rows += range(at, at + count)
            at += len(chunk.drafts) + 1
        chosen = sample(logits if len(rows) == len(logits) else logits[rows], states, indices=indices)
        updates: list[Update] = []
        at = 0
        for (chunk, _), first_row in zip(choosing, first_rows, strict=True):
            count = len(chunk.drafts) + 1 if self._state(chunk.sequence).is_stateless else 1
            own = logits[first_row : first_row + len(chunk.drafts) + 1]
            updates.append(self._accept(chunk, own, _part_of(chosen, at, at + count)))
            at += count
        return updates

    def _state(self, sequence: Sequence) -> SamplingState:
        state = self._live[sequence.sequence_id].sampling
        assert state is not None
        return state

    def _accept(self, chunk: Chunk, logits: torch.Tensor, chosen: Sampled) -> Update:
        """Take tokens as long as the drafts before them were right. logits: (drafts + 1, V)."""
        live = self._live[chunk.sequence.sequence_id]
        state = self._state(chunk.sequence)
        sequence = chunk.sequence
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] = []
        reason: FinishReason | None = None
        for index in range(len(chunk.drafts) + 1):
            if index == len(chosen.token_ids):  # this row depends on the token before it
                chosen = _joined(chosen, sample(logits[index : index + 1], [state]))
            error = chosen.errors[index]
            if error is not None:
                self.finish(sequence)
                return Update(sequence, tuple(tokens), tuple(logprobs), "error", error)
            token = chosen.token_ids[index]
            if token in state.stop_ids:
                reason = "stop"
                break
            tokens.append(token)
            state.push(token)
            logprob = chosen.logprobs[index]
            if logprob is not None:
                logprobs.append(logprob)
            if state.num_outputs == live.max_outputs:
                reason = "length"
                break
            if index < len(chunk.drafts) and token != chunk.drafts[index]:
                break
        self.stats.num_output_tokens += len(tokens)
        self._tell_drafter(chunk, tokens)
        self.scheduler.computed(chunk, tokens)
        if reason is None:
            return Update(sequence, tuple(tokens), tuple(logprobs))
        self.finish(sequence)
        return Update(sequence, tuple(tokens), tuple(logprobs), reason, prompt_logprobs=_in_order(live))

    # -- speculation --------------------------------------------------------------------------------------

    def _draft(self) -> None:
        """Let the drafter propose for the sequences that decode."""
        if self._drafter is None:
            return
        sequences: list[Sequence] = []
        limits: list[int] = []
        for sequence in self.scheduler.running:
            if sequence.num_left != 1 or sequence.task is not Task.GENERATE or sequence.num_outputs == 0:
                continue
            room = sequence.max_total_tokens - len(sequence.tokens) - 1
            wanted = min(self._drafter.wanted(sequence), room)
            reserved = self.scheduler.reserve(sequence, wanted) if wanted > 0 else 0
            if reserved > 0:
                sequences.append(sequence)
                limits.append(reserved)
        if sequences:
            states = [self._state(sequence) for sequence in sequences]
            proposals = self._drafter.propose(sequences, limits, states)
            for sequence, proposal in zip(sequences, proposals, strict=True):
                sequence.drafts = proposal

    def _tell_drafter(self, chunk: Chunk, tokens: list[int]) -> None:
        if self._drafter is None or not chunk.drafts:
            return
        agreed = [d == t for d, t in zip(chunk.drafts, tokens, strict=False)]
        num_accepted = agreed.index(False) if False in agreed else len(agreed)
        self.stats.num_accepted_tokens += num_accepted
        self._drafter.accepted(chunk.sequence, num_proposed=len(chunk.drafts), num_accepted=num_accepted)


def _part_of(chosen: Sampled, first: int, end: int) -> Sampled:
    return Sampled(chosen.token_ids[first:end], chosen.logprobs[first:end], chosen.errors[first:end])


def _joined(one: Sampled, other: Sampled) -> Sampled:
    return Sampled(one.token_ids + other.token_ids, one.logprobs + other.logprobs, one.errors + other.errors)


def _in_order(live: _Live) -> tuple[TokenLogprobs, ...] | None:
    if live.top is None:
        return None
    return tuple(live.prompt_logprobs[position] for position in sorted(live.prompt_logprobs))
