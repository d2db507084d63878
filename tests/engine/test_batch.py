"""What a step writes, and where."""

import pytest
import torch

from internlm2.engine.compute.batch import Part, make_batch, runs_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("pages", "first_slot"),
    [([5, 6, 7, 8], 80), ([5, 9, 2, 8], None), ([5, 7, 6, 8], None), ([8, 7, 6, 5], None), ([5], 80)],
)
def test_only_pages_in_order_are_one_piece_of_memory(pages, first_slot):
    count = 16 * len(pages)
    batch = make_batch([Part(list(range(count)), 0, pages, count)], page_size=16, device=CPU)
    assert batch.first_slot == first_slot
    assert batch.slots.tolist() == [page * 16 + offset for page in pages for offset in range(16)]


def test_several_sequences_are_never_one_piece():
    batch = make_batch([Part([1], 0, [3], 9), Part([2], 1, [3], 9)], page_size=16, device=CPU)
    assert batch.first_slot is None


def test_runs_join_pages_that_follow_each_other():
    assert runs_of([5, 6, 2, 3, 4, 9], 90, 16) == ((80, 32), (32, 48), (144, 10))
