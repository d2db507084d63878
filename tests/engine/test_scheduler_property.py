"""Whoever comes and goes, every sequence finishes, and what it reads from the pages is always its own."""

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from shadow_memory import ShadowMemory, shared_pages

from internlm2.engine.schedule.pages import PagePool
from internlm2.engine.schedule.request import Chunk, Sequence, Status, Task
from internlm2.engine.schedule.scheduler import Plan, Scheduler

ALPHABET = 3


class SchedulerMachine(RuleBasedStateMachine):
    """An engine without a network: sequences come and go at any time, and a memory remembers what was written."""

    is_set_up = False

    @initialize(
        num_pages=st.integers(3, 12) | st.integers(3, 40),
        page_size=st.integers(1, 4),
        num_host_pages=st.integers(0, 10),
        shares=st.sampled_from([True, True, True, False]),
        max_num_seqs=st.integers(1, 6),
        chunk_tokens=st.integers(1, 12),
        fixed_chunks=st.booleans(),
        is_greedy=st.booleans(),
    )
    def set_up(
        self,
        *,
        num_pages: int,
        page_size: int,
        num_host_pages: int,
        shares: bool,
        max_num_seqs: int,
        chunk_tokens: int,
        fixed_chunks: bool,
        is_greedy: bool,
    ) -> None:
        self.pool = PagePool(
            num_pages, page_size=page_size, num_host_pages=num_host_pages, shares_prefixes=shares
        )
        self.scheduler = Scheduler(
            self.pool, max_num_seqs=max_num_seqs, chunk_tokens=chunk_tokens, fixed_chunks=fixed_chunks
        )
        self.memory = ShadowMemory(page_size)
        self.is_set_up = True
        self.is_greedy = is_greedy
        self.live: list[Sequence] = []
        self.seen: list[list[int]] = []
        self.num_added = 0

    # -- rules --------------------------------------------------------------------------------------------

    @rule(
        seed=st.integers(0, 2**32),
        count=st.sampled_from([1, 1, 2, 4]),
        num_new=st.integers(1, 30),
        namespace=st.sampled_from(["base", "base", "adapter"]),
        priority=st.sampled_from([0, 0, 0, 1, 2]),
        task=st.sampled_from([Task.GENERATE, Task.GENERATE, Task.GENERATE, Task.SCORE]),
    )
    def add(self, *, seed: int, count: int, num_new: int, namespace: str, priority: int, task: Task) -> None:
        """`count` sequences with the same prompt: new, or one that goes on where an earlier one was."""
        rng = random.Random(seed)
        room = self.pool.num_pages * self.pool.page_size
        prompt = [rng.randrange(2) for _ in range(rng.randint(1, min(24, room)))]
        if self.seen and rng.random() < 0.5:
            earlier = rng.choice(self.seen)
            prompt = earlier[: rng.randint(1, len(earlier))] + prompt[: rng.randint(0, 3)]
        prompt = prompt[:room]
        for _ in range(count):
            is_score = task is Task.SCORE
            wants_logits = is_score or rng.random() < 0.2
            self.num_added += 1
            sequence = Sequence(
                sequence_id=self.num_added,
                tokens=list(prompt),
                max_total_tokens=len(prompt) if is_score else min(len(prompt) + num_new, room),
                task=task,
                priority=priority,
                logits_from=rng.randint(0, len(prompt)) if wants_logits else None,
                namespace=namespace,
            )
            if not is_score and sequence.max_total_tokens == len(prompt):
                continue  # nothing to generate
            self.scheduler.add(sequence)
            self.live.append(sequence)

    @rule(seed=st.integers(0, 2**32), steps=st.sampled_from([1, 1, 2, 5]))
    def step(self, seed: int, steps: int) -> None:
        rng = random.Random(seed)
        for _ in range(steps):
            if self.scheduler.has_work:
                self.one_step(rng)
                self.holds()

    @rule(index=st.integers(0, 50))
    def abort(self, index: int) -> None:
        if self.live:
            self.scheduler.finish(self.live.pop(index % len(self.live)))

    @rule(seed=st.integers(0, 2**32))
    def abort_during_a_step(self, seed: int) -> None:
        if self.scheduler.has_work:
            self.one_step(random.Random(seed), aborts=True)

    @rule()
    def forget(self) -> None:
        self.pool.forget()

    @rule()
    def interrupt(self) -> None:
        """A step fails half-way: nothing in memory can be trusted."""
        self.scheduler.schedule()
        self.memory.clear()
        self.scheduler.restart()

    # -- one step -----------------------------------------------------------------------------------------

    def one_step(self, rng: random.Random, *, aborts: bool = False) -> None:
        self.draft(rng)
        plan = self.scheduler.schedule()
        assert plan.chunks, "there is work, and none was planned"
        self.check_plan(plan)
        self.memory.move(plan.moves)
        for chunk in plan.chunks:
            self.compute(chunk)
        for chunk in plan.chunks:  # nobody wrote into the pages of another
            self.read(chunk.sequence, chunk.start + chunk.num_tokens)
        for victim in rng.sample(self.live, rng.randint(0, min(2, len(self.live))) if aborts else 0):
            self.scheduler.finish(victim)
            self.live.remove(victim)
        for chunk in plan.chunks:
            self.read_off(chunk, rng)

    def draft(self, rng: random.Random) -> None:
        for sequence in self.scheduler.running:
            if sequence.num_outputs > 0 and sequence.num_left == 1 and rng.random() < 0.5:
                count = rng.randint(0, 5)
                if rng.random() < 0.7:
                    count = self.scheduler.reserve(sequence, count)
                assert count >= 0
                sequence.drafts = [rng.randrange(ALPHABET) for _ in range(count)]

    def check_plan(self, plan: Plan) -> None:
        scheduler = self.scheduler
        ids = [chunk.sequence.sequence_id for chunk in plan.chunks]
        assert len(set(ids)) == len(ids)
        assert all(chunk.num_tokens > 0 for chunk in plan.chunks)
        assert all(chunk.start == chunk.sequence.num_computed for chunk in plan.chunks)
        prefills = [chunk for chunk in plan.chunks if chunk.sequence.num_left > 1]
        if scheduler.fixed_chunks:
            assert not any(chunk.drafts for chunk in plan.chunks)
            prefills = [chunk for chunk in prefills if chunk.start < chunk.sequence.num_prompt]
            for chunk in prefills:
                assert chunk.start % scheduler.chunk_tokens == 0
                end = chunk.start + chunk.num_tokens
                assert end % scheduler.chunk_tokens == 0 or end == chunk.sequence.num_prompt
        assert sum(chunk.num_tokens for chunk in prefills) <= scheduler.chunk_tokens
        for chunk in plan.chunks:
            sequence = chunk.sequence
            assert sequence.status is Status.RUNNING
            if (
                sequence.num_preemptions == 0
                and chunk.start == sequence.num_cached
                and not sequence.num_outputs
            ):
                assert chunk.start <= (
                    sequence.num_prompt if sequence.logits_from is None else sequence.logits_from
                )
            end = chunk.start + chunk.num_tokens + len(chunk.drafts)
            assert end <= len(sequence.pages.ids) * self.pool.page_size, "a chunk has no page to write to"
            assert end <= max(sequence.max_total_tokens - 1, len(sequence.tokens))
        for sequence in plan.preempted:
            assert sequence.status is Status.WAITING
        first = min(scheduler.running, key=lambda s: (-s.priority, s.arrival))
        assert first.sequence_id in ids, "the first in line makes no progress"

    def how(self, sequence: Sequence, position: int) -> tuple[int, int] | None:
        """With fixed chunks the chunk that computes a position depends on nothing but its sequence."""
        if not self.scheduler.fixed_chunks:
            return None
        if position >= sequence.num_prompt:
            return position, 1
        size = self.scheduler.chunk_tokens
        start = position // size * size
        return start, min(size, sequence.num_prompt - start)

    def read(self, sequence: Sequence, num_tokens: int) -> None:
        assert sequence.pages is not None
        tokens = sequence.tokens[:num_tokens]
        self.memory.check(sequence.pages, tokens, how=lambda position: self.how(sequence, position))

    def compute(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        assert sequence.pages is not None
        self.read(sequence, chunk.start)
        end = chunk.start + chunk.num_tokens + len(chunk.drafts)
        page_size = self.pool.page_size
        written = {sequence.pages.ids[p // page_size] for p in range(chunk.start, end)}
        assert not written & shared_pages(self.pool), "a shared page is written"
        how = (chunk.start, chunk.num_tokens) if self.scheduler.fixed_chunks else None
        tokens = sequence.tokens[: chunk.start] + chunk.token_ids
        self.memory.write(sequence.pages, tokens, chunk.start, how=how)

    def read_off(self, chunk: Chunk, rng: random.Random) -> None:
        sequence = chunk.sequence
        if sequence.status is Status.FINISHED:
            self.scheduler.computed(chunk, [1])
            return
        if chunk.start + chunk.num_tokens >= sequence.num_prompt and sequence.task is Task.GENERATE:
            sequence.logits_from = None  # read by now
        if not chunk.reaches_end:
            self.scheduler.computed(chunk, [])
            return
        new = self.choose(chunk, rng) if sequence.task is Task.GENERATE else []
        is_stopped = rng.random() < 0.05
        self.scheduler.computed(chunk, new)
        is_full = len(sequence.tokens) == sequence.max_total_tokens
        if is_stopped or is_full:
            self.seen.append(list(sequence.tokens))
            self.scheduler.finish(sequence)
            self.live.remove(sequence)

    def choose(self, chunk: Chunk, rng: random.Random) -> list[int]:
        """Some of the drafts and another token."""
        sequence = chunk.sequence
        new: list[int] = []
        for draft in (*chunk.drafts, None):
            known = sequence.tokens + new
            token = (sum(known) + len(known)) % ALPHABET if self.is_greedy else rng.randrange(ALPHABET)
            if draft is not None and rng.random() < 0.5:
                token = draft
            new.append(token)
            if token != draft:
                break
        return new[: sequence.max_total_tokens - len(sequence.tokens)]

    # -- what always holds --------------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        self.scheduler.check_integrity()
        assert sorted(s.sequence_id for s in self.scheduler.running + self.scheduler.waiting) == sorted(
            s.sequence_id for s in self.live
        )
        size = self.scheduler.chunk_tokens
        is_fixed = self.scheduler.fixed_chunks
        memory = self.memory.copy()
        memory.move(self.pool._moves)  # `reserve` may have asked for some
        memory.check_cache(self.pool, how=lambda p: (p // size * size, size) if is_fixed else None)

    def teardown(self) -> None:
        """Everybody gets to the end, and everything comes back."""
        if not self.is_set_up:
            return
        rng = random.Random(0)
        for _ in range(sum(s.max_total_tokens + 1 for s in self.live)):
            if self.scheduler.has_work:
                self.one_step(rng)
                self.scheduler.check_integrity()
        assert not self.live, "a sequence never finishes"
        self.holds()
        assert self.pool.num_available == self.pool.num_pages
        assert self.pool.take_moves() == []
        self.pool.forget()
        self.scheduler.check_integrity()
        assert self.pool.num_available == self.pool._num_free


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=300, stateful_step_count=30, deadline=None, derandomize=True)
