"""Pages have one owner each, or are shared by equal prefixes; idle ones stay until their room is needed."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shadow_memory import ShadowMemory

from internlm2.engine.schedule.pages import Direction, PagePool, Pages

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=24)


@dataclass
class Holder:
    """A sequence as far as the pool cares."""

    tokens: list[int]
    pages: Pages
    num_computed: int


def start(pool: PagePool, tokens: list[int], namespace: object = None, *, limit: int | None = None) -> Holder:
    """Begin a sequence with pages for all of its tokens, and announce it."""
    pages, num_cached = pool.begin(tokens, namespace, limit=len(tokens) if limit is None else limit)
    assert pool.grow(pages, pool.pages_for(len(tokens)))
    pool.announce(pages, tokens, limit=len(tokens))
    return Holder(tokens, pages, num_cached)


def cache(pool: PagePool, tokens: list[int], namespace: object = None) -> list[int]:
    """Compute a sequence and let it go; returns the pages that it had."""
    holder = start(pool, tokens, namespace)
    ids = list(holder.pages.ids)
    pool.store(holder.pages, tokens, len(tokens))
    pool.release(holder.pages)
    return ids


def num_cached(pool: PagePool, tokens: list[int], namespace: object = None) -> int:
    """How many tokens a sequence would find, on the device or in host memory."""
    trail: list = []
    pool.upcoming(tokens, namespace, limit=len(tokens), trail=trail)
    return len(trail) * pool.page_size


@given(
    page_size=st.integers(1, 4),
    stored=st.lists(TOKENS, max_size=6),
    tokens=TOKENS,
    cut=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_longest_known_prefix_is_found(
    page_size: int, stored: list[list[int]], tokens: list[int], cut: int
) -> None:
    pool = PagePool(500, page_size=page_size)
    for other in stored:
        cache(pool, other)
    limit = max(len(tokens) - cut, 0)
    pages, cached = pool.begin(tokens, None, limit=limit)
    common = [
        sum(1 for n in range(1, min(len(other), limit) + 1) if other[:n] == tokens[:n]) for other in stored
    ]
    assert cached == max((n - n % page_size for n in common), default=0)
    assert len(pages.ids) * page_size == cached


def test_new_sequence_gets_one_run_of_pages() -> None:
    pool = PagePool(20, page_size=2, shares_prefixes=False)
    short = [start(pool, [n]) for n in range(10)]
    for holder in short[1:9:2]:
        pool.release(holder.pages)  # holes of one page
    assert start(pool, list(range(12))).pages.ids == list(range(10, 16))


def test_slack_stays_free_behind_a_sequence_so_that_it_grows_in_one_piece() -> None:
    pool = PagePool(20, page_size=2)
    one, other = Pages(None), Pages(None)
    assert pool.grow(one, 2, slack=4)
    assert pool.grow(other, 2, slack=4)
    assert pool.grow(one, 6)
    assert one.ids == [0, 1, 2, 3, 4, 5]
    assert other.ids == [6, 7]


def test_scattered_pages_are_used_when_there_is_no_run() -> None:
    pool = PagePool(8, page_size=1, shares_prefixes=False)
    holders = [start(pool, [n]) for n in range(8)]
    for holder in holders[::2]:
        pool.release(holder.pages)
    assert start(pool, [1, 2, 3]).pages.ids == [0, 2, 4]


def test_growing_beyond_the_pool_changes_nothing() -> None:
    pool = PagePool(4, page_size=2)
    holder = start(pool, [1, 2, 3])
    assert not pool.grow(holder.pages, 5)
    assert len(holder.pages.ids) == 2
    pool.check_integrity([holder.pages])


def test_second_sequence_shares_the_full_pages_of_the_first() -> None:
    pool = PagePool(8, page_size=2)
    first = start(pool, [1, 2, 3, 4, 5])
    pool.store(first.pages, first.tokens, 5)
    second = start(pool, [1, 2, 3, 4, 6])
    assert second.num_computed == 4
    assert second.pages.ids[:2] == first.pages.ids[:2]
    assert second.pages.ids[2] != first.pages.ids[2]
    assert pool.num_held == 4


def test_namespaces_do_not_share() -> None:
    pool = PagePool(8, page_size=2)
    cache(pool, [1, 2, 3, 4], "base")
    assert num_cached(pool, [1, 2, 3, 4], "base") == 4
    assert num_cached(pool, [1, 2, 3, 4], "adapter") == 0


def test_unfinished_page_is_announced_and_never_shared() -> None:
    pool = PagePool(8, page_size=2)
    leader, _ = pool.begin([1, 2, 3, 4], None, limit=3)
    assert pool.grow(leader, 2)
    pool.announce(leader, [1, 2, 3, 4], limit=4, priority=7)
    assert pool.upcoming([1, 2, 9], None, limit=2) == 7
    assert pool.upcoming([1, 9, 9], None, limit=2) is None
    assert pool.begin([1, 2, 9], None, limit=2)[1] == 0
    pool.store(leader, [1, 2, 3, 4], 2)
    assert pool.upcoming([1, 2, 9], None, limit=2) is None
    assert pool.upcoming([1, 2, 3, 4, 9], None, limit=4) == 7
    pool.release(leader)
    assert pool.upcoming([1, 2, 3, 4, 9], None, limit=4) is None
    assert num_cached(pool, [1, 2, 3, 4]) == 2


def test_least_recently_used_leaf_goes_first() -> None:
    pool = PagePool(4, page_size=1)
    cache(pool, [1, 2])
    cache(pool, [3])
    cache(pool, [4])
    cache(pool, [1, 2])  # used again
    holder = start(pool, [5])
    assert [num_cached(pool, tokens) for tokens in ([3], [4], [1, 2])] == [0, 1, 2]
    assert pool.grow(holder.pages, 3)
    assert [num_cached(pool, tokens) for tokens in ([4], [1, 2])] == [0, 1], (
        "the end of a prefix goes before it"
    )
    assert pool.grow(holder.pages, 4)
    assert num_cached(pool, [1, 2]) == 0


def test_held_pages_are_never_evicted() -> None:
    pool = PagePool(4, page_size=1)
    held = start(pool, [1, 2])
    pool.store(held.pages, held.tokens, 2)
    for token in range(3, 30):
        cache(pool, [token, token])
    assert num_cached(pool, [1, 2]) == 2


def test_spilled_pages_come_back() -> None:
    pool = PagePool(2, page_size=1, num_host_pages=2)
    memory = ShadowMemory(1)
    for tokens in ([1, 2], [3, 4]):
        holder = start(pool, tokens)
        memory.move(pool.take_moves())
        memory.write(holder.pages, tokens, 0)
        pool.store(holder.pages, tokens, 2)
        pool.release(holder.pages)
    pages, cached = pool.begin([1, 2], None, limit=2)
    moves = pool.take_moves()
    assert cached == 2
    assert [move.direction for move in moves].count(Direction.TO_DEVICE) == 2
    memory.move(moves)
    memory.check(pages, [1, 2])
    pool.check_integrity([pages])


def test_full_host_memory_drops_its_oldest_page() -> None:
    pool = PagePool(1, page_size=1, num_host_pages=2)
    for token in range(4):
        cache(pool, [token])
    assert [num_cached(pool, [token]) for token in range(4)] == [0, 1, 1, 1]


def test_without_host_memory_nothing_is_moved() -> None:
    pool = PagePool(2, page_size=1)
    for token in range(5):
        cache(pool, [token])
    assert pool.take_moves() == []


def test_page_in_host_memory_is_replaced_by_one_that_was_computed_again() -> None:
    pool = PagePool(2, page_size=1, num_host_pages=1)
    cache(pool, [1])
    wide = start(pool, [2, 3])  # sends [1] to host memory
    pool.release(wide.pages)
    again = start(pool, [1], limit=0)
    pool.store(again.pages, again.tokens, 1)
    assert len(pool._free_host) == 1
    assert again.pages.nodes[0].page == again.pages.ids[0]
    pool.check_integrity([again.pages])


def test_page_computed_twice_is_kept_once() -> None:
    pool = PagePool(4, page_size=2)
    one, other = start(pool, [1, 2]), start(pool, [1, 2], limit=0)
    pool.store(other.pages, [1, 2], 2)
    assert other.pages.ids != one.pages.ids, "the one who announced it is not ready yet"
    pool.store(one.pages, [1, 2], 2)
    pool.store(other.pages, [1, 2], 2)
    assert other.pages.ids == one.pages.ids
    assert pool.num_held == 1


def test_trail_forgets_nodes_that_are_gone() -> None:
    pool = PagePool(4, page_size=1)
    cache(pool, [1, 2, 3])
    trail: list = []
    pool.upcoming([1, 2, 3], None, limit=3, trail=trail)
    assert len(trail) == 3
    cache(pool, [7, 8, 9])  # evicts [3] and [2]
    pool.upcoming([1, 2, 3], None, limit=3, trail=trail)
    assert len(trail) == 1
    pool.forget()
    cache(pool, [1, 2, 3])
    assert pool.begin([1, 2, 3], None, limit=3, trail=trail)[1] == 3


def test_queues_do_not_grow_with_the_number_of_requests() -> None:
    pool = PagePool(4, page_size=1, num_host_pages=4)
    for n in range(20_000):
        cache(pool, [n % 7, n % 3])
        pool.take_moves()
    assert len(pool._leave_device) < 2_000
    assert len(pool._leave_host) < 2_000


def test_private_pool_shares_nothing() -> None:
    pool = PagePool(4, page_size=1, shares_prefixes=False)
    cache(pool, [1, 2])
    assert pool.begin([1, 2], None, limit=2)[1] == 0
    assert pool.num_available == 4


def lose_a_page(pool: PagePool, holder: Holder) -> None:
    holder.pages.ids.pop()


def own_twice(pool: PagePool, holder: Holder) -> None:
    holder.pages.ids[-1] = holder.pages.ids[0]


def miscount_holders(pool: PagePool, holder: Holder) -> None:
    holder.pages.nodes[0].num_holders += 1


def miscount_free(pool: PagePool, holder: Holder) -> None:
    pool._num_free += 1


def miscount_idle(pool: PagePool, holder: Holder) -> None:
    pool._num_idle += 1


def swap_pages(pool: PagePool, holder: Holder) -> None:
    holder.pages.ids[0], holder.pages.ids[1] = holder.pages.ids[1], holder.pages.ids[0]


def lose_a_host_page(pool: PagePool, holder: Holder) -> None:
    pool._free_host.pop()


def hold_what_is_gone(pool: PagePool, holder: Holder) -> None:
    pool._tree._roots.clear()


def share_the_unfinished(pool: PagePool, holder: Holder) -> None:
    holder.pages.nodes[1].is_ready = False


def miscount_children(pool: PagePool, holder: Holder) -> None:
    holder.pages.nodes[0].num_children_here += 1


def stick(pool: PagePool, holder: Holder) -> None:
    pool._leave_device._heap.clear()


FAULTS = {
    "lost or doubled": [lose_a_page, own_twice],
    "miscounts? its holders|counts its holders": [miscount_holders],
    "count of free": [miscount_free],
    "count of idle": [miscount_idle],
    "another page than its node": [swap_pages],
    "host page is lost": [lose_a_host_page],
    "outside the tree": [hold_what_is_gone],
    "counts as ready": [share_the_unfinished],
    "children on the device": [miscount_children],
    "stuck": [stick],
}


@pytest.mark.parametrize(
    ("message", "fault"),
    [(message, fault) for message, faults in FAULTS.items() for fault in faults],
    ids=[fault.__name__ for faults in FAULTS.values() for fault in faults],
)
def test_check_integrity_finds_planted_faults(message: str, fault) -> None:
    pool = PagePool(10, page_size=1, num_host_pages=2)
    cache(pool, [7, 8])
    holder = start(pool, [1, 2, 3])
    pool.store(holder.pages, holder.tokens, 2)
    assert pool.grow(holder.pages, 4)
    pool.check_integrity([holder.pages])
    fault(pool, holder)
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity([holder.pages])
