"""What is packed comes back, and lies where the layout says."""

import copy

import pytest
import torch

from internlm2.kernels import pack_int8, unpack
from internlm2.kernels.packed import HUGE_PAGE_BYTES, allocate
from kernels.kernel_cases import NAMES, random_case


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (33, 100), (64, 128), (5000, 33)])
def test_unpack_gives_back_what_was_packed(name: str, rows: int, columns: int) -> None:
    case = random_case(name, rows, columns)
    torch.testing.assert_close(unpack(case.packed), case.matrix.float(), rtol=1e-6, atol=1e-7)
    part = unpack(case.packed, 32, 50)
    torch.testing.assert_close(part, case.matrix.float()[32:50], rtol=1e-6, atol=1e-7)


def test_words_of_32_rows_alternate_and_scales_follow_their_group() -> None:
    q = torch.arange(64 * 64).remainder(255).sub(127).to(torch.int8).view(64, 64)
    scales = torch.arange(128).view(64, 2).to(torch.bfloat16)
    groups = pack_int8(q, scales, group=32).data.view(2, 2, 8 * 32 * 4 + 64)  # block, group
    words = groups[..., :1024].view(2, 2, 8, 32, 4)  # word, row, byte
    for row, column in ((0, 0), (31, 5), (32, 63), (63, 62)):
        word = words[row // 32, column // 32, column % 32 // 4, row % 32]
        assert word[column % 4] == int(q[row, column]) + 128
    found = groups[..., 1024:].view(torch.bfloat16)  # block, group, row
    assert found.transpose(1, 2).reshape(64, 2).equal(scales)


@pytest.mark.parametrize(
    ("name", "bits"), [("bfloat16", 16), ("int8", 8.125), ("int4", 4.125), ("int4-zeros", 4.1875)]
)
def test_bits_per_weight(name: str, bits: float) -> None:
    assert random_case(name, 256, 512, group=128).packed.num_bytes * 8 / (256 * 512) == bits


def test_memory_is_aligned_and_zero() -> None:
    for num_bytes in (1, 100, HUGE_PAGE_BYTES - 1, 3 * HUGE_PAGE_BYTES + 5):
        memory = allocate(num_bytes)
        assert len(memory) == num_bytes
        assert memory.data_ptr() % (HUGE_PAGE_BYTES if num_bytes > HUGE_PAGE_BYTES / 2 else 64) == 0
        assert not memory.any()


def test_a_copy_shares_the_memory() -> None:
    packed = random_case("int8", 32, 32).packed
    assert copy.deepcopy(packed).data.data_ptr() == packed.data.data_ptr()
