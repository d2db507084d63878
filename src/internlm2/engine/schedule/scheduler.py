"""Which tokens of which sequences the next step computes: continuous batching with chunked prefill.

Sequences that decode go first, one token each; what is left of the step's budget goes to prompts, so a long prompt
never holds up an answer for longer than one chunk (the idea of Sarathi-Serve, arXiv 2403.02310). When memory runs
out the least important sequence gives its pages back and is computed again later. Pure bookkeeping, no tensors.
"""

import bisect
import itertools
import math
from dataclasses import dataclass

from internlm2.engine.schedule.pages import Move, PagePool
from internlm2.engine.schedule.request import Chunk, Sequence, Status

OLDEST_SHARE = 4  # the oldest unfinished prompt always gets this part of the prefill budget: one in four
_MAX_PASSED = 32  # sequences that may be passed over in one step because they wait for a shared prefix
_SLACK_TOKENS = 1024  # room left behind a new sequence, so that its pages stay in one piece


@dataclass(frozen=True)
class Plan:
    """One step. chunks: decoding sequences first. moves: pages to copy before. preempted: sequences sent back."""

    chunks: list[Chunk]
    moves: list[Move]
    preempted: list[Sequence]

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(chunk.num_tokens + len(chunk.drafts) for chunk in self.chunks)


class Scheduler:
    """Sequences that wait, sequences that run, and the pages that they hold.

    max_num_seqs: how many run at once. chunk_tokens: how many prompt tokens a step computes at most.
    fixed_chunks: prompts are cut at multiples of chunk_tokens, answers are computed one token at a time also when
    they are computed again, drafts are ignored, and only whole chunks are shared: the shape of each sequence's work
    does not depend on its company (deterministic mode).
    """

    def __init__(
        self, pool: PagePool, *, max_num_seqs: int, chunk_tokens: int, fixed_chunks: bool = False
    ) -> None:
        assert max_num_seqs > 0
        assert chunk_tokens > 0
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.chunk_tokens = chunk_tokens
        self.fixed_chunks = fixed_chunks
        self.waiting: list[Sequence] = []  # in order of service, both: priority, then arrival
        self.running: list[Sequence] = []
        self._arrivals = itertools.count()
        # Prefixes are shared in multiples of this.
        self._shared_tokens = math.lcm(chunk_tokens, pool.page_size) if fixed_chunks else pool.page_size

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Take a new sequence. It must fit into the pool alone: max_total_tokens <= the pool's tokens."""
        assert self.pool.pages_for(sequence.max_total_tokens) <= self.pool.num_pages
        sequence.arrival = next(self._arrivals)
        self._wait(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Let a sequence go, finished or aborted, whatever it was doing."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        if sequence.pages is not None:
            self.pool.release(sequence.pages)
            sequence.pages = None
        sequence.status = Status.FINISHED

    def computed(self, chunk: Chunk, new_tokens: list[int]) -> None:
        """Note that a chunk is done. new_tokens: what was chosen after it; drafts among them are computed as well.

        A sequence without any token left to compute must be finished before the next step. One that was let go
        since the step was planned is ignored.
        """
        sequence = chunk.sequence
        if sequence.status is Status.FINISHED:
            return
        assert sequence.pages is not None
        num_confirmed = 0
        for draft, token in zip(chunk.drafts, new_tokens, strict=False):
            if draft != token:
                break
            num_confirmed += 1
        sequence.num_computed = chunk.start + chunk.num_tokens + num_confirmed
        sequence.tokens += new_tokens
        sequence.drafts = []
        shared = self._shareable(sequence) if self.fixed_chunks else sequence.num_computed
        self.pool.store(sequence.pages, sequence.tokens, min(sequence.num_computed, shared))

    def reserve(self, sequence: Sequence, num_drafts: int) -> int:
        """Get pages for tokens beyond the known ones of a running sequence; how many there is room for.

        Drafts never take the pages that running sequences need for their next token.
        """
        assert sequence.pages is not None
        num_known = len(sequence.tokens)
        spare = max(self.pool.num_available - len(self.running), 0)
        wanted = self.pool.pages_for(num_known + num_drafts)
        self.pool.grow(sequence.pages, min(wanted, len(sequence.pages.ids) + spare))
        return min(max(len(sequence.pages.ids) * self.pool.page_size - num_known, 0), num_drafts)

    def restart(self) -> None:
        """Compute everything again: for when a step was interrupted and no page can be trusted."""
        for sequence in list(self.running):
            self._preempt(sequence, [])
        self.pool.forget()
        self.pool.take_moves()

    def schedule(self) -> Plan:
        """The next step. Empty only when nothing waits or runs."""
        preempted: list[Sequence] = []
        self._make_room(preempted)
        self._admit(preempted)
        decodes = [
            Chunk(s, s.num_computed, 1, self._drafts_that_fit(s))
            for s in self.running
            if self._is_decoding(s)
        ]
        return Plan(decodes + self._prefills(), self.pool.take_moves(), preempted)

    # -- what runs ----------------------------------------------------------------------------------------

    def _is_decoding(self, sequence: Sequence) -> bool:
        if self.fixed_chunks and sequence.num_computed >= sequence.num_prompt:
            return True  # an answer that is computed again
        return len(sequence.tokens) - sequence.num_computed == 1

    def _drafts_that_fit(self, sequence: Sequence) -> tuple[int, ...]:
        if not sequence.drafts or self.fixed_chunks:
            return ()
        room = sequence.max_total_tokens - len(sequence.tokens) - 1
        return tuple(sequence.drafts[: self.reserve(sequence, min(room, len(sequence.drafts)))])

    def _make_room(self, preempted: list[Sequence]) -> None:
        """Get pages for all known tokens of those that run, sending the last ones back when need be."""
        for sequence in list(self.running):
            num_pages = self.pool.pages_for(len(sequence.tokens))
            while sequence.pages is not None and not self.pool.grow(sequence.pages, num_pages):
                self._preempt(self.running[-1], preempted)

    def _preempt(self, sequence: Sequence, preempted: list[Sequence]) -> None:
        assert sequence.pages is not None
        self.running.remove(sequence)
        self.pool.release(sequence.pages)
        sequence.pages = None
        sequence.num_computed = 0
        sequence.drafts = []
        sequence.num_preemptions += 1
        preempted.append(sequence)
        self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        bisect.insort(self.waiting, sequence, key=_service_order)

    # -- who may start ------------------------------------------------------------------------------------

    def _admit(self, preempted: list[Sequence]) -> None:
        """Let waiting sequences in, in order of service, while there is room."""
        num_passed = 0
        for sequence in list(self.waiting):
            if sequence in preempted or num_passed == _MAX_PASSED:  # sent away just now for want of room
                return
            if not self._may_have_seat(sequence):
                return
            limit = self._reusable(sequence)
            upcoming = self.pool.upcoming(
                sequence.tokens, sequence.namespace, limit=limit, trail=sequence.trail
            )
            if upcoming is not None and upcoming >= sequence.priority:
                num_passed += 1
                continue  # another sequence computes the same prefix right now
            if not self._clear_room(sequence, preempted) or not self._start(sequence, limit):
                return

    def _reusable(self, sequence: Sequence) -> int:
        """How many tokens may come from the cache: not those whose logits are wanted, and never all."""
        first_wanted = len(sequence.tokens) - 1 if sequence.logits_from is None else sequence.logits_from
        return min(first_wanted, len(sequence.tokens) - 1, self._shareable(sequence))

    def _shareable(self, sequence: Sequence) -> int:
        """How many tokens others may reuse: with fixed chunks only whole chunks, as everybody would compute them."""
        if not self.fixed_chunks:
            return len(sequence.tokens)
        return sequence.num_prompt - sequence.num_prompt % self._shared_tokens

    def _may_have_seat(self, sequence: Sequence) -> bool:
        return len(self.running) < self.max_num_seqs or self.running[-1].priority < sequence.priority

    def _clear_room(self, sequence: Sequence, preempted: list[Sequence]) -> bool:
        """Make sure that `sequence` fits in, sending back those of lower priority if that helps; False if not."""
        if self._fits(sequence):
            return True
        lower = [s for s in self.running if s.priority < sequence.priority]
        num_left = len(self.running) - len(lower)
        most = self.pool.num_available + sum(len(s.pages.ids) for s in lower if s.pages is not None)
        if num_left >= self.max_num_seqs or most - self._num_taken(sequence) < num_left:
            return False
        while lower and not self._fits(sequence):
            self._preempt(lower.pop(), preempted)
        return self._fits(sequence)

    def _fits(self, sequence: Sequence) -> bool:
        # One page for each running sequence stays in reserve, or the newcomer would be sent back at once.
        reserve = len(self.running)
        has_pages = self.pool.num_available - self._num_taken(sequence) >= reserve
        return has_pages and len(self.running) < self.max_num_seqs

    def _num_taken(self, sequence: Sequence) -> int:
        return self.pool.num_taken(self.pool.pages_for(len(sequence.tokens)), sequence.trail)

    def _start(self, sequence: Sequence, limit: int) -> bool:
        tokens = sequence.tokens
        while True:
            pages, num_cached = self.pool.begin(tokens, sequence.namespace, limit=limit, trail=sequence.trail)
            if num_cached % self._shared_tokens == 0:
                break
            self.pool.release(pages)
            limit = num_cached - num_cached % self._shared_tokens
        slack = self.pool.pages_for(min(sequence.max_total_tokens - len(tokens), _SLACK_TOKENS))
        if not self.pool.grow(pages, self.pool.pages_for(len(tokens)), slack=slack):
            self.pool.release(pages)  # less of the prefix could be used than there is
            return False
        self.pool.announce(pages, tokens, limit=self._shareable(sequence), priority=sequence.priority)
        sequence.pages = pages
        sequence.trail = []
        sequence.num_computed = num_cached
        if sequence.num_preemptions == 0:
            sequence.num_cached = num_cached
        sequence.status = Status.RUNNING
        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=_service_order)
        return True

    # -- prompts ------------------------------------------------------------------------------------------

    def _prefills(self) -> list[Chunk]:
        """Cut the budget into chunks: the oldest prompt is sure of its share, shorter rests go before longer ones."""
        prefills = [s for s in self.running if not self._is_decoding(s)]
        if not prefills:
            return []
        oldest = prefills[0]
        if self.fixed_chunks:  # whole chunks only, so one sequence a step
            return [Chunk(oldest, oldest.num_computed, self._fixed_size(oldest))]
        share = min(oldest.num_left, max(self.chunk_tokens // OLDEST_SHARE, 1))
        left = self.chunk_tokens - share
        chunks: list[Chunk] = []
        for sequence in sorted(prefills[1:], key=lambda s: (-s.priority, s.num_left)):
            size = min(sequence.num_left, left)
            if size > 0:
                chunks.append(Chunk(sequence, sequence.num_computed, size))
                left -= size
        return [Chunk(oldest, oldest.num_computed, min(oldest.num_left, share + left)), *chunks]

    def _fixed_size(self, sequence: Sequence) -> int:
        """Up to the next multiple of chunk_tokens, and never past the prompt: the answer is computed token by token."""
        start = sequence.num_computed
        end = min((start // self.chunk_tokens + 1) * self.chunk_tokens, sequence.num_prompt)
        return end - start

    # -- proof --------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise AssertionError unless pages, queues and sequences agree."""
        for sequence in self.running:
            assert sequence.status is Status.RUNNING
            assert sequence.pages is not None
            assert sequence.num_computed < len(sequence.tokens) or sequence.num_outputs == 0
            assert sequence.num_computed <= len(sequence.pages.ids) * self.pool.page_size
        for sequence in self.waiting:
            assert sequence.status is Status.WAITING
            assert sequence.pages is None
            assert sequence.num_computed == 0
        assert self.waiting == sorted(self.waiting, key=_service_order)
        assert self.running == sorted(self.running, key=_service_order)
        assert len(self.running) <= self.max_num_seqs
        self.pool.check_integrity(s.pages for s in self.running if s.pages is not None)


def _service_order(sequence: Sequence) -> tuple[int, int]:
    return (-sequence.priority, sequence.arrival)
