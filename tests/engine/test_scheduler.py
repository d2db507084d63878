"""Every sequence is served, in order, within its memory."""

import itertools

import pytest

from internlm2.engine.schedule.pages import PagePool
from internlm2.engine.schedule.request import Sequence, Status
from internlm2.engine.schedule.scheduler import Plan, Scheduler

_IDS = itertools.count()


def make(
    num_pages: int = 100, *, page_size: int = 2, seqs: int = 8, chunk: int = 8, fixed: bool = False
) -> Scheduler:
    pool = PagePool(num_pages, page_size=page_size)
    return Scheduler(pool, max_num_seqs=seqs, chunk_tokens=chunk, fixed_chunks=fixed)


def add(
    scheduler: Scheduler,
    tokens: list[int],
    *,
    num_new: int = 4,
    priority: int = 0,
    logits_from: int | None = None,
    namespace: object = None,
) -> Sequence:
    """Take a sequence."""
    sequence = Sequence(
        sequence_id=next(_IDS),
        tokens=list(tokens),
        max_total_tokens=len(tokens) + num_new,
        priority=priority,
        logits_from=logits_from,
        namespace=namespace,
    )
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler, *, new: int = 9) -> Plan:
    """Plan a step and say that it is done: everybody's next token is `new`."""
    plan = scheduler.schedule()
    for chunk in plan.chunks:
        sequence = chunk.sequence
        scheduler.computed(chunk, [new] if chunk.reaches_end else [])
        if len(sequence.tokens) == sequence.max_total_tokens:
            scheduler.finish(sequence)
    scheduler.check_integrity()
    return plan


def run(scheduler: Scheduler) -> None:
    for _ in range(10_000):
        if not scheduler.has_work:
            return
        step(scheduler)
    raise AssertionError("it never ends")


def sizes(plan: Plan) -> dict[int, int]:
    """Tokens of each sequence in a step."""
    return {chunk.sequence.sequence_id: chunk.num_tokens for chunk in plan.chunks}


def starts(scheduler: Scheduler, sequence: Sequence) -> list[tuple[int, int]]:
    """Run to the end; the chunks of one sequence."""
    found: list[tuple[int, int]] = []
    while scheduler.has_work:
        found += [(c.start, c.num_tokens) for c in step(scheduler).chunks if c.sequence is sequence]
    return found


def test_long_prompt_is_computed_in_chunks_and_then_decodes() -> None:
    scheduler = make(chunk=8)
    sequence = add(scheduler, list(range(20)), num_new=3)
    assert starts(scheduler, sequence) == [(0, 8), (8, 8), (16, 4), (20, 1), (21, 1)]
    assert sequence.outputs == [9, 9, 9]


def test_second_turn_computes_only_its_new_tokens() -> None:
    scheduler = make(page_size=2)
    first = add(scheduler, [1, 2, 3, 4, 5], num_new=4)
    run(scheduler)
    second = add(scheduler, [*first.tokens, 6, 7])
    plan = step(scheduler)
    assert second.num_cached == 8, "all that was computed: the last token of an answer never is"
    assert sizes(plan) == {second.sequence_id: 3}


def test_siblings_wait_for_the_shared_prompt() -> None:
    scheduler = make(page_size=2, chunk=32)
    prompt = list(range(16))
    leader = add(scheduler, [*prompt, 100])
    siblings = [add(scheduler, [*prompt, 101 + n]) for n in range(3)]
    other = add(scheduler, [50, 51])
    plan = step(scheduler)
    assert set(sizes(plan)) == {leader.sequence_id, other.sequence_id}, "who shares nothing is not held up"
    step(scheduler)
    assert [s.num_cached for s in siblings] == [16, 16, 16]
    assert all(s.status is Status.RUNNING for s in siblings)


def test_aborted_leader_frees_its_followers() -> None:
    scheduler = make(chunk=4)
    leader = add(scheduler, list(range(20)))
    follower = add(scheduler, list(range(20)))
    step(scheduler)
    assert follower.status is Status.WAITING
    scheduler.finish(leader)
    step(scheduler)
    assert follower.status is Status.RUNNING
    assert follower.num_cached == 4, "what the leader had computed is used"


def test_higher_priority_does_not_wait_for_a_lower_leader() -> None:
    scheduler = make(chunk=4)
    add(scheduler, list(range(20)))
    step(scheduler)
    urgent = add(scheduler, list(range(20)), priority=1)
    assert urgent.sequence_id in sizes(step(scheduler))


def test_a_short_prompt_is_scheduled_in_the_next_step_beside_a_long_one() -> None:
    scheduler = make(chunk=8)
    long = add(scheduler, list(range(100)))
    assert sizes(step(scheduler)) == {long.sequence_id: 8}
    short = add(scheduler, [200, 201, 202])
    assert sizes(step(scheduler)) == {long.sequence_id: 5, short.sequence_id: 3}
    assert short.num_outputs == 1


def test_decoding_is_never_held_up_by_a_prompt() -> None:
    scheduler = make(chunk=8)
    first = add(scheduler, [1, 2, 3], num_new=30)
    step(scheduler)
    long = add(scheduler, list(range(100)))
    for _ in range(5):
        assert sizes(step(scheduler)) == {first.sequence_id: 1, long.sequence_id: 8}


def test_oldest_prompt_is_never_starved() -> None:
    scheduler = make(1000, chunk=8, seqs=50)
    long = add(scheduler, list(range(80)), num_new=1)
    for n in range(50):
        for m in range(4):
            add(scheduler, [1000 + 10 * n + m, *range(7)], num_new=1)
        plan = step(scheduler)
        if long.status is Status.FINISHED:
            break
        assert sizes(plan)[long.sequence_id] >= 8 // 4
    assert n < 80 / (8 // 4)


def test_who_came_first_is_served_first_and_priority_before_that() -> None:
    scheduler = make(seqs=1)
    sequences = [add(scheduler, [n, n], num_new=1, priority=p) for n, p in enumerate([0, 0, 2, 1, 2])]
    served = [step(scheduler).chunks[0].sequence for _ in range(5)]
    assert served == [sequences[n] for n in (2, 4, 3, 0, 1)]


def test_higher_priority_preempts_lower() -> None:
    scheduler = make(seqs=2)
    sequences = [add(scheduler, [n, n]) for n in range(2)]
    step(scheduler)
    urgent = add(scheduler, [7, 7], priority=1)
    plan = step(scheduler)
    assert plan.preempted == [sequences[1]], "the last one in line goes"
    assert set(sizes(plan)) == {sequences[0].sequence_id, urgent.sequence_id}
    run(scheduler)
    assert sequences[1].num_outputs == 4


def test_higher_priority_preempts_nobody_when_that_would_not_help() -> None:
    scheduler = make(10, page_size=2)
    add(scheduler, [1] * 14, priority=2, num_new=2)
    low = add(scheduler, [2, 2], priority=0, num_new=4)
    for _ in range(2):
        step(scheduler)
    assert low.status is Status.RUNNING
    add(scheduler, [3] * 8, priority=1)
    assert step(scheduler).preempted == []


def test_last_one_in_line_goes_when_memory_runs_out_and_loses_nothing() -> None:
    scheduler = make(8, page_size=2, seqs=4)
    first, second = (add(scheduler, [n] * 4, num_new=10) for n in range(2))
    preempted: list[Sequence] = []
    while scheduler.has_work:
        preempted += step(scheduler).preempted
    assert set(preempted) == {second}
    assert first.num_preemptions == 0
    assert first.num_outputs == second.num_outputs == 10


def test_lone_sequence_that_fills_the_pool_is_never_preempted() -> None:
    scheduler = make(8, page_size=2)
    for n in range(3):  # the pages of earlier ones give way
        sequence = add(scheduler, [n, 2, 3], num_new=13)
        run(scheduler)
        assert sequence.num_preemptions == 0
        assert sequence.num_outputs == 13


def test_waiting_sequence_without_room_causes_no_work() -> None:
    scheduler = make(10, page_size=2)
    add(scheduler, [1] * 10, num_new=9)
    step(scheduler)
    waiting = add(scheduler, [2] * 12, num_new=2)
    for _ in range(3):
        plan = step(scheduler)
        assert plan.moves == []
        assert plan.preempted == []
        assert waiting.status is Status.WAITING


def test_newcomer_leaves_a_page_for_the_next_token_of_everybody() -> None:
    scheduler = make(6, page_size=1)
    add(scheduler, [1, 2], num_new=3)
    step(scheduler)
    newcomer = add(scheduler, [3, 4, 5], num_new=1)
    assert step(scheduler).preempted == []
    assert newcomer.status is Status.WAITING, "3 pages are held, and one of the other 3 is needed at once"
    run(scheduler)
    assert newcomer.num_preemptions == 0


def test_confirmed_drafts_count_as_computed() -> None:
    scheduler = make(chunk=8)
    sequence = add(scheduler, [1, 2, 3], num_new=10)
    step(scheduler)
    sequence.drafts = [5, 6, 7]
    [chunk] = scheduler.schedule().chunks
    assert chunk.token_ids == [9, 5, 6, 7]
    scheduler.computed(chunk, [5, 6, 8])
    assert sequence.tokens == [1, 2, 3, 9, 5, 6, 8]
    assert sequence.num_computed == 6
    assert sequence.num_left == 1


def test_drafts_never_go_beyond_the_last_token() -> None:
    scheduler = make()
    sequence = add(scheduler, [1, 2, 3], num_new=4)
    step(scheduler)
    sequence.drafts = [5, 6, 7, 8, 9]
    [chunk] = scheduler.schedule().chunks
    assert chunk.drafts == (5, 6), "with one token after them the sequence is complete"


def test_drafts_never_take_the_pages_that_others_need() -> None:
    scheduler = make(6, page_size=1)
    first, second = (add(scheduler, [n], num_new=4) for n in range(2))
    step(scheduler)
    first.drafts = [5, 5, 5]
    assert scheduler.reserve(first, 3) == 1, "2 are held, 2 are for the next tokens, 1 of 3 drafts has 2"
    plan = step(scheduler)
    assert plan.preempted == []
    assert set(sizes(plan)) == {first.sequence_id, second.sequence_id}


def test_tokens_that_are_forced_upon_a_sequence_are_computed_together() -> None:
    scheduler = make(chunk=8)
    sequence = add(scheduler, [1, 2, 3], num_new=12)
    [chunk] = scheduler.schedule().chunks
    scheduler.computed(chunk, [4, 5, 6, 7, 8])
    assert sizes(step(scheduler)) == {sequence.sequence_id: 5}
    assert sequence.num_left == 1


def test_positions_whose_logits_are_wanted_are_computed_again() -> None:
    scheduler = make(page_size=2)
    add(scheduler, list(range(10)))
    run(scheduler)
    sequence = add(scheduler, list(range(10)), logits_from=5)
    step(scheduler)
    assert sequence.num_cached == 4


def test_namespaces_are_computed_apart() -> None:
    scheduler = make(chunk=32)
    one, other = (add(scheduler, list(range(10)), namespace=name) for name in ("one", "other"))
    assert sizes(step(scheduler)) == {one.sequence_id: 10, other.sequence_id: 10}


def test_fixed_chunks_are_the_same_alone_and_in_company() -> None:
    prompt = list(range(19))
    alone = make(chunk=8, fixed=True)
    expected = starts(alone, add(alone, prompt, num_new=3))
    assert expected == [(0, 8), (8, 8), (16, 3), (19, 1), (20, 1)]
    crowd = make(chunk=8, fixed=True)
    for n in range(3):
        add(crowd, [*range(12), 50 + n], num_new=8)
    for _ in range(4):
        step(crowd)
    assert starts(crowd, add(crowd, prompt, num_new=3)) == expected[1:], (
        "a whole chunk is shared, nothing less"
    )


def test_answer_is_computed_again_token_by_token_with_fixed_chunks() -> None:
    scheduler = make(chunk=4, fixed=True)
    sequence = add(scheduler, list(range(6)), num_new=5)
    for _ in range(4):
        step(scheduler)
    assert sequence.num_outputs == 3
    scheduler.restart()
    assert starts(scheduler, sequence) == [(0, 4), (4, 2), (6, 1), (7, 1), (8, 1), (9, 1)]


def test_preempted_prompt_of_whole_chunks_starts_again_with_its_answer() -> None:
    scheduler = make(chunk=4, fixed=True, seqs=1)
    sequence = add(scheduler, list(range(8)), num_new=5)
    for _ in range(4):
        step(scheduler)
    urgent = add(scheduler, [50], num_new=1, priority=1)
    assert sizes(step(scheduler)) == {urgent.sequence_id: 1}
    assert starts(scheduler, sequence) == [(8, 1), (9, 1), (10, 1), (11, 1)]


def test_restart_computes_everything_again() -> None:
    scheduler = make(chunk=4)
    sequence = add(scheduler, list(range(6)))
    step(scheduler)
    scheduler.schedule()
    scheduler.restart()
    assert scheduler.pool.num_available == scheduler.pool._num_free == scheduler.pool.num_pages
    assert starts(scheduler, sequence)[0] == (0, 4)
    assert sequence.num_outputs == 4


def test_sequence_that_is_aborted_while_it_is_computed_is_ignored() -> None:
    scheduler = make()
    sequence = add(scheduler, [1, 2, 3])
    [chunk] = scheduler.schedule().chunks
    scheduler.finish(sequence)
    scheduler.computed(chunk, [4])
    assert sequence.tokens == [1, 2, 3]
    scheduler.finish(sequence)
    assert not scheduler.has_work
    scheduler.check_integrity()


def test_sequence_that_can_never_fit_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        add(make(4, page_size=2), [1] * 6, num_new=3)


def test_work_of_a_step_does_not_grow_with_the_length_of_a_sequence() -> None:
    """Counted in comparisons of pages, not in seconds."""
    scheduler = make(20_000, page_size=2, chunk=4096)
    leader = add(scheduler, list(range(20_000)), num_new=20)
    waiting = [add(scheduler, list(range(20_000)), num_new=20) for _ in range(3)]
    counts: list[int] = []
    key = scheduler.pool._tree.key

    def counted(tokens: list[int], index: int) -> tuple[int, ...]:
        counts[-1] += 1
        return key(tokens, index)

    scheduler.pool._tree.key = counted
    while leader.status is not Status.FINISHED:
        counts.append(0)
        step(scheduler)
    assert all(s.status is Status.RUNNING for s in waiting)
    assert counts[0] <= 10_000 + 2 + len(waiting), "the announcement, once"
    assert max(counts[1:]) <= len(waiting) * (2048 + 2), "those who wait look at what is new"
    assert sum(counts[-15:]) <= 50
