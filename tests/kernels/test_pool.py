"""Threads: many callers at once, a fork, and more threads than cores.

NOTE: products of less than 256 KiB of weights (times rows) are not shared out, so all here are larger.
"""

import os
import threading

import pytest
import torch

from internlm2.kernels import linear
from internlm2.kernels.library import Library
from internlm2.kernels.packed import allocate
from kernels.kernel_cases import random_case


def test_callers_in_many_threads_get_their_own_results(built: Library) -> None:
    cases = [random_case("int8", 3000, 128, seed=seed).packed for seed in range(4)]
    xs = [torch.randn(seed + 1, 128) for seed in range(4)]
    expected = [linear(x, packed, num_threads=1) for x, packed in zip(xs, cases, strict=True)]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(300):
            if not torch.equal(linear(xs[i], cases[i], num_threads=3), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_every_number_of_threads_gives_the_same_bits(built: Library, num_threads: int) -> None:
    packed = random_case("bfloat16", 1000, 64).packed
    x = torch.randn(20, 64)
    expected = linear(x, packed, num_threads=1)
    for _ in range(200):
        assert torch.equal(linear(x, packed, num_threads=num_threads), expected)


def test_a_forked_process_has_threads_of_its_own(built: Library) -> None:
    packed = random_case("int4", 8000, 64).packed
    x = torch.randn(3, 64)
    expected = linear(x, packed, num_threads=2)
    pid = os.fork()
    if pid == 0:  # NOTE: no torch operation here: its own threads do not survive a fork
        out = torch.empty_like(expected)
        for _ in range(50):
            built.linear(packed.pointer, x.data_ptr(), 1, 3, 64, out.data_ptr(), 1, 8000, 2)
        os._exit(0 if out.numpy().tobytes() == expected.numpy().tobytes() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_the_probe_reads_everything_once(level: str, built: Library) -> None:
    data = allocate(5 << 20)
    data[:: 1 << 12] = 1
    total = built.read(data.data_ptr(), len(data), 2)
    assert total == int(data.numpy().view("uint64").sum())
    data[-1] = 7
    assert built.read(data.data_ptr(), len(data), 2) != total


def test_the_number_of_threads_may_change_at_every_call(built: Library) -> None:
    packed = random_case("int8", 3000, 128).packed
    x = torch.randn(2, 128)
    expected = linear(x, packed, num_threads=1)
    for turn in range(600):
        assert torch.equal(linear(x, packed, num_threads=(7, 2, 1, 5, 3)[turn % 5]), expected)
