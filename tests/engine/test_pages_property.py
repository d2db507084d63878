"""Whatever sequences do with the pool, each reads only what is its own, and nothing is lost."""

import random
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from shadow_memory import ShadowMemory, shared_pages

from internlm2.engine.schedule.pages import PagePool, Pages
from internlm2.engine.schedule.prefix_tree import Node

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=24)
SEEDS = st.integers(0, 2**32)


@dataclass
class Holder:
    """A sequence as far as the pool cares."""

    tokens: list[int]
    pages: Pages
    num_computed: int


class PoolMachine(RuleBasedStateMachine):
    """Sequences that come, compute, grow and go, against a memory that remembers what was written where."""

    is_set_up = False

    @initialize(
        num_pages=st.integers(3, 10) | st.integers(3, 40),
        page_size=st.integers(1, 4),
        num_host_pages=st.sampled_from([0, 1, 2, 3, 5, 10]),
        shares=st.sampled_from([True, True, True, False]),
    )
    def set_up(self, num_pages: int, page_size: int, num_host_pages: int, shares: bool) -> None:
        self.pool = PagePool(
            num_pages, page_size=page_size, num_host_pages=num_host_pages, shares_prefixes=shares
        )
        self.memory = ShadowMemory(page_size)
        self.is_set_up = True
        self.holders: list[Holder] = []
        self.seen: list[list[int]] = []
        self.trails: dict[object, list[Node]] = {}

    @rule(seed=SEEDS)
    def start(self, seed: int) -> None:
        """A sequence, new or like an earlier one, takes pages for all of its tokens."""
        rng = random.Random(seed)
        namespace = rng.choice(["base", "base", "adapter"])
        tokens = [rng.randrange(2) for _ in range(rng.randint(1, 20))]
        if self.seen and rng.random() < 0.7:
            earlier = rng.choice(self.seen[-8:])
            tokens = (
                earlier[: rng.choice([len(earlier), rng.randint(1, len(earlier))])]
                + tokens[: rng.randint(0, 3)]
            )
        tokens = tokens[: self.pool.num_pages * self.pool.page_size]
        limit = max(len(tokens) - rng.choice([0, 1, rng.randint(0, 6)]), 0)
        num_available = self.pool.num_available
        trail = self.trails.setdefault((namespace, tuple(tokens), limit), [])
        upcoming = self.pool.upcoming(tokens, namespace, limit=limit, trail=trail)
        assert upcoming == self.pool.upcoming(tokens, namespace, limit=limit)
        num_pages = self.pool.pages_for(len(tokens))
        num_taken = self.pool.num_taken(num_pages, trail)
        pages, num_cached = self.pool.begin(tokens, namespace, limit=limit, trail=trail)
        assert num_cached <= limit
        fits = self.pool.grow(pages, num_pages)
        assert fits == (num_taken <= num_available), "the pool promised room that it has not, or the reverse"
        if not fits:
            self.pool.release(pages)
            return
        assert self.pool.num_available == num_available - num_taken
        if rng.random() < 0.7:
            self.pool.announce(pages, tokens, limit=limit)
        self.holders.append(Holder(tokens, pages, num_cached))
        self.seen.append(tokens)

    @precondition(lambda self: self.holders)
    @rule(seed=SEEDS)
    def compute(self, seed: int) -> None:
        """A step: the moves, then some tokens of some sequences."""
        self.memory.move(self.pool.take_moves())
        rng = random.Random(seed)
        for holder in rng.sample(self.holders, rng.randint(1, len(self.holders))):
            end = rng.choice([len(holder.tokens), rng.randint(holder.num_computed, len(holder.tokens))])
            self.compute_until(holder, end)

    def compute_until(self, holder: Holder, end: int) -> None:
        page_size = self.pool.page_size
        written = {holder.pages.ids[p // page_size] for p in range(holder.num_computed, end)}
        assert not written & shared_pages(self.pool), "a shared page is written"
        self.memory.write(holder.pages, holder.tokens[:end], holder.num_computed)
        holder.num_computed = end
        self.pool.store(holder.pages, holder.tokens, end)

    @rule(seed=SEEDS, count=st.integers(1, 5))
    def serve(self, seed: int, count: int) -> None:
        """Sequences that come, are computed and go: the cache fills."""
        for number in range(count):
            num_holders = len(self.holders)
            self.start(seed + number)
            if len(self.holders) > num_holders:
                self.memory.move(self.pool.take_moves())
                self.compute_until(self.holders[-1], len(self.holders[-1].tokens))
                self.pool.release(self.holders.pop().pages)

    @precondition(lambda self: self.holders)
    @rule(index=st.integers(0, 9), tokens=TOKENS, slack=st.integers(0, 3))
    def grow(self, index: int, tokens: list[int], slack: int) -> None:
        holder = self.holders[index % len(self.holders)]
        num_pages = self.pool.pages_for(len(holder.tokens) + len(tokens))
        before = list(holder.pages.ids)
        fits = num_pages - len(before) <= self.pool.num_available
        assert self.pool.grow(holder.pages, num_pages, slack=slack) == fits
        assert holder.pages.ids[: len(before)] == before
        if fits:
            holder.tokens = holder.tokens + tokens
        else:
            assert holder.pages.ids == before

    @precondition(lambda self: self.holders)
    @rule(index=st.integers(0, 9))
    def release(self, index: int) -> None:
        self.pool.release(self.holders.pop(index % len(self.holders)).pages)

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        assert self.pool.num_available == self.pool._num_free
        assert len(self.pool._free_host) == self.pool._num_host_pages

    @invariant()
    def holds(self) -> None:
        self.pool.check_integrity(holder.pages for holder in self.holders)
        memory = self.memory.copy()
        memory.move(self.pool._moves)
        memory.check_cache(self.pool)
        for holder in self.holders:
            memory.check(holder.pages, holder.tokens[: holder.num_computed])

    def teardown(self) -> None:
        if not self.is_set_up:
            return
        while self.holders:
            self.release(0)
        self.holds()
        assert self.pool.num_available == self.pool.num_pages
        self.forget()
        assert not list(self.pool._tree)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=300, stateful_step_count=40, deadline=None, derandomize=True)
