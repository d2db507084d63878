"""Attention over pages: C++ = twin at every instruction level; twin = torch's own attention in float64."""

import pytest
import torch
import torch.nn.functional as F

from internlm2.kernels.attention import Pages, PageTable, attend, write
from internlm2.kernels.attention_twin import attend_twin, write_twin
from internlm2.kernels.library import Library
from internlm2.quant import kv
from kernels.page_cases import MIXED, PAIRS, SHAPES, Case, random_case, random_pages

F32, BF16 = torch.float32, torch.bfloat16
TOLERANCE = {F32: {"rtol": 1e-5, "atol": 3e-6}, BF16: {"rtol": 0.02, "atol": 0.01}}


def dense(case: Case, index: int) -> torch.Tensor:
    """torch's attention of one sequence in float64: (T, H, D)."""
    start, num, first, slots = case.sequences[index]
    pages = case.pages
    k, v = pages.keys[1, slots].double(), pages.values[1, slots].double()
    if pages.key_scales is not None and pages.value_scales is not None:
        k, v = k * pages.key_scales[1, slots][..., None], v * pages.value_scales[1, slots][..., None]
    mask = torch.ones(num, len(slots), dtype=torch.bool).tril(first)
    q = case.q[start : start + num].double().transpose(0, 1)
    out = F.scaled_dot_product_attention(
        q[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        scale=case.scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_is_the_twin_and_the_twin_is_torch(level: str, dtypes, shape) -> None:
    case = random_case(dtypes, shape, MIXED)
    expected = attend_twin(case.pages, case.table, 1, case.q, scale=case.scale)
    found = attend(case.pages, case.table, 1, case.q, scale=case.scale, num_threads=1)
    assert found.dtype == dtypes[0]
    torch.testing.assert_close(found, expected, **TOLERANCE[dtypes[0]])
    assert torch.equal(found, attend(case.pages, case.table, 1, case.q, scale=case.scale, num_threads=2))
    for index, (start, num, _, _) in enumerate(case.sequences):
        truth = dense(case, index)
        torch.testing.assert_close(expected[start : start + num].double(), truth, **TOLERANCE[dtypes[0]])


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_every_number_of_rows_and_every_cut_gives_the_same_bits(level: str, dtypes) -> None:
    case = random_case(dtypes, (2, 3, 64), [(33, 240), (1, 40)])
    whole = attend(case.pages, case.table, 1, case.q, scale=case.scale, num_threads=2)
    for num_rows in range(1, 34):
        table, q = case.part(0, 33 - num_rows, num_rows)
        out = attend(case.pages, table, 1, q, scale=case.scale, num_threads=1 + num_rows % 2)
        assert torch.equal(out, whole[33 - num_rows : 33]), num_rows
    for row in range(33):  # each as if it decoded
        table, q = case.part(0, row, 1)
        assert torch.equal(attend(case.pages, table, 1, q, scale=case.scale), whole[row : row + 1]), row


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 64), (2, 4, 128)], ids=str)  # joined by one thread, and by all
def test_a_long_sequence_that_is_cut_for_the_threads_gives_the_same_bits(level: str, dtypes, shape) -> None:
    case = random_case(dtypes, shape, [(1, 6000), (3, 4998)])
    alone = attend(case.pages, case.table, 1, case.q, scale=case.scale, num_threads=1)
    torch.testing.assert_close(alone[:1].double(), dense(case, 0), **TOLERANCE[dtypes[0]])
    torch.testing.assert_close(alone[1:].double(), dense(case, 1), **TOLERANCE[dtypes[0]])
    for num_threads in (2, 3, 7):
        for _ in range(5):
            out = attend(case.pages, case.table, 1, case.q, scale=case.scale, num_threads=num_threads)
            assert torch.equal(out, alone)


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_query_that_is_not_finite_spoils_its_own_row_only(level: str, dtypes, bad: float) -> None:
    case = random_case(dtypes, (2, 2, 64), [(9, 70), (1, 30)])
    clean = attend(case.pages, case.table, 1, case.q, scale=case.scale)
    case.q[4, :, 3] = bad
    out = attend(case.pages, case.table, 1, case.q, scale=case.scale)
    assert not out[4].isfinite().all(-1).any()
    rest = [row for row in range(10) if row != 4]
    assert torch.equal(out[rest], clean[rest])


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("what", ["keys", "values"])
@pytest.mark.parametrize("position", [71, 72])  # the first and the second of a pair
def test_a_bad_key_or_value_reaches_those_that_see_it_only(
    level: str, dtypes, bad: float, what: str, position: int
) -> None:
    case = random_case(dtypes, (2, 2, 64), [(9, 68), (1, 30)])
    clean = attend(case.pages, case.table, 1, case.q, scale=case.scale)
    slot = case.sequences[0][3][position]
    if dtypes[1] == torch.int8:
        scales = case.pages.key_scales if what == "keys" else case.pages.value_scales
        scales[1, slot] = bad
    else:
        getattr(case.pages, what)[1, slot] = bad
    out = attend(case.pages, case.table, 1, case.q, scale=case.scale)
    first_bad = position - 68
    assert torch.equal(out[:first_bad], clean[:first_bad])
    assert torch.equal(out[9:], clean[9:])
    if what == "values" or bad is torch.nan:
        assert not out[first_bad:9].isfinite().any()


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_memory_that_is_not_the_sequences_own_is_never_used(level: str, dtypes) -> None:
    case = random_case(dtypes, (2, 2, 64), MIXED)
    clean = attend(case.pages, case.table, 1, case.q, scale=case.scale)
    own = torch.tensor([slot for sequence in case.sequences for slot in sequence[3]])
    others = torch.ones(case.pages.keys.shape[1], dtype=torch.bool)
    others[own] = False
    for block in (case.pages.keys, case.pages.values, case.pages.key_scales, case.pages.value_scales):
        if block is not None:
            block[0] = 77 if block.dtype == torch.int8 else torch.nan
            block[1, others] = 77 if block.dtype == torch.int8 else torch.nan
    assert torch.equal(attend(case.pages, case.table, 1, case.q, scale=case.scale), clean)


def test_int8_keys_and_values_cost_only_the_rounding_of_the_result(built: Library) -> None:
    if built.level_name != "avx512":
        pytest.skip("products of whole numbers are for AVX-512")
    for shape in [(2, 2, 64), (1, 2, 128), (1, 2, 1024)]:
        case = random_case((BF16, torch.int8), shape, [(1, 700), (40, 300)])
        truth = torch.cat([dense(case, index) for index in range(2)])
        out = attend(case.pages, case.table, 1, case.q, scale=case.scale)
        rounded = (truth.bfloat16() - truth).norm()
        assert (out - truth).norm() < 1.02 * rounded


@pytest.mark.parametrize("row", [0, 20])  # one that has its keys read in place, one of a packed tile
def test_the_largest_whole_numbers_do_not_overflow(level: str, row: int) -> None:
    case = random_case((BF16, torch.int8), (1, 1, 1024), [(1, 100), (20, 60)])
    case.q[row] = 1.9921875  # all ones in the mantissa
    case.pages.keys[1] = -128
    case.pages.values[1] = 127
    case.pages.key_scales[1] = 1e-4
    case.pages.value_scales[1] = 1 / 127
    out = attend(case.pages, case.table, 1, case.q, scale=case.scale)
    torch.testing.assert_close(out[row].float(), torch.ones(1, 1024), rtol=0.01, atol=0)
    case.pages.keys[1, case.sequences[0 if row == 0 else 1][3][5]] = 127  # the only one that counts
    case.pages.key_scales[1] = 1.0
    case.pages.values[1] = 0
    case.pages.values[1, case.sequences[0 if row == 0 else 1][3][5]] = 64
    out = attend(case.pages, case.table, 1, case.q, scale=case.scale)
    torch.testing.assert_close(out[row].float(), torch.full((1, 1024), 64 / 127), rtol=0.01, atol=0)


def test_a_value_scale_below_zero_is_seen(built: Library) -> None:
    case = random_case((BF16, torch.int8), (2, 2, 64), [(9, 70), (1, 30)])
    expected = attend_twin(case.pages, case.table, 1, case.q, scale=case.scale)
    case.pages.value_scales[1, case.sequences[0][3][5]] = -0.01
    out = attend(case.pages, case.table, 1, case.q, scale=case.scale)
    if built.level_name == "avx512":
        assert out[:9].isnan().all()
    torch.testing.assert_close(out[9:], expected[9:], **TOLERANCE[BF16])


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_every_number_of_queries_of_a_head_reads_the_same_keys(level: str, dtypes, group: int) -> None:
    case = random_case(dtypes, (2, group, 64), [(1, 200), (2, 200)])
    out = attend(case.pages, case.table, 1, case.q, scale=case.scale)
    for index, (start, num, _, _) in enumerate(case.sequences):
        truth = dense(case, index)
        torch.testing.assert_close(out[start : start + num].double(), truth, **TOLERANCE[dtypes[0]])


@pytest.mark.parametrize("size", [1e-30, 1e4])
def test_very_flat_and_very_sharp_scores(level: str, size: float) -> None:
    case = random_case((F32, F32), (1, 2, 64), [(5, 300)])
    case.q[:] *= size
    truth = dense(case, 0)
    torch.testing.assert_close(
        attend(case.pages, case.table, 1, case.q, scale=case.scale).double(), truth, rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 34, 5])
def test_what_is_written_is_what_the_twin_writes(level: str, dtypes, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = (2, 64, 3, head_dim)
    slots = torch.randperm(64, generator=generator)[:40]
    both = [random_pages(dtypes[1], shape, torch.Generator().manual_seed(1)) for _ in range(2)]
    qkv = torch.randn(40, 3, 4, head_dim + 1, generator=generator).to(dtypes[0])
    qkv[3] = 0
    qkv[5, 1, :, 2] = torch.nan
    k, v = qkv[:, :, 1, 1:], qkv[:, :, 2, 1:]  # strided, and not aligned
    for pages, function in zip(both, (write, write_twin), strict=True):
        spans = [(row, 1, 0, [(slot, 1)]) for row, slot in enumerate(slots.tolist())]
        function(pages, PageTable(pages, spans, slots), 1, k, v)
    for name in ("keys", "values", "key_scales", "value_scales"):
        ours, theirs = (getattr(pages, name) for pages in both)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0, equal_nan=True)
    if dtypes[1] == torch.int8:  # and what quant/kv.py says
        packed, scale = kv.quantize(k[:5])
        assert torch.equal(both[0].keys[1, slots[:5]], packed)
        torch.testing.assert_close(both[0].key_scales[1, slots[:5]], scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("spans", "slots"),
    [
        ([(0, 1, 4, [(60, 5)])], [0]),  # behind the last slot
        ([(0, 1, 4, [(-1, 5)])], [0]),
        ([(0, 1, 4, [(0, 4)])], [0]),  # a position without a slot
        ([(0, 1, 4, [(0, 6)])], [0]),
        ([(0, 2, 0, [(0, 2)])], [0]),  # a row that no span has
        ([(1, 1, 0, [(0, 1)])], [0]),
        ([(0, 1, 0, [(0, 1)])], [64]),
        ([(0, 1, 0, [(0, 1)])], [-1]),
    ],
)
def test_slots_out_of_the_memory_are_refused(spans, slots: list[int]) -> None:
    pages = random_pages(F32, (1, 64, 1, 16), torch.Generator())
    with pytest.raises(AssertionError):
        PageTable(pages, spans, torch.tensor(slots))


def test_wrong_shapes_are_refused() -> None:
    case = random_case((F32, F32), (2, 2, 64), [(1, 30)])
    for q in (case.q[:, :3], case.q[:, :, :32], case.q.expand(2, -1, -1)):
        with pytest.raises(AssertionError):
            attend(case.pages, case.table, 1, q, scale=1.0)
    with pytest.raises(AssertionError):
        attend(case.pages, case.table, 2, case.q, scale=1.0)
    with pytest.raises(AssertionError):
        Pages(case.pages.keys, case.pages.values[:, 1:])


def test_without_the_library_the_twin_computes(built: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case((F32, torch.int8), (2, 3, 64), MIXED)
    found = attend(case.pages, case.table, 0, case.q, scale=case.scale)
    k, v = torch.randn(2, len(case.q), 2, 64)
    write(case.pages, case.table, 0, k, v)
    keys = case.pages.keys.clone()
    monkeypatch.setattr("internlm2.kernels.attention.library", lambda: None)
    write(case.pages, case.table, 0, k, v)
    assert torch.equal(case.pages.keys, keys)
    assert not torch.equal(attend(case.pages, case.table, 0, case.q, scale=case.scale), found)
    torch.testing.assert_close(
        attend(case.pages, case.table, 0, case.q, scale=case.scale),
        attend_twin(case.pages, case.table, 0, case.q, scale=case.scale),
    )
