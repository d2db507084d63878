"""The Triton kernels against their twins: on a GPU where there is one, else in Triton's interpreter.

pytest does not find this file by itself: `test_triton.py` runs it in a process of its own, for the interpreter must be
asked for before Triton is imported, and `benchmarks/gpu.py` runs it on the GPU.
"""

import os

import pytest
import torch

from internlm2.kernels.gpu import attention, elementwise, fp8, linear, weight
from internlm2.kernels.gpu.available import runs_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
PAGE = 16


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to one rounding of the dtype, and the order of float32 sums."""
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def runs_exactly(dtype: torch.dtype) -> bool:
    """Triton's interpreter cuts float32 to bfloat16 instead of rounding it."""
    return DEVICE.type == "cuda" or dtype != torch.bfloat16


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR).to(dtype).to(DEVICE)


GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def _same_numbers():
    GENERATOR.manual_seed(0)


def test_this_runs_triton():
    assert DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    assert runs_triton(normal(1))


def random_pages(
    num_pages: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, *, is_int8: bool
) -> attention.LayerPages:
    shape = (num_pages * PAGE, num_kv_heads, head_dim)
    if not is_int8:
        return attention.LayerPages(normal(*shape, dtype=dtype), normal(*shape, dtype=dtype), PAGE)
    keys, values = (
        torch.randint(-127, 128, shape, dtype=torch.int8, generator=GENERATOR).to(DEVICE) for _ in range(2)
    )
    scales = [(normal(*shape[:2]).abs() + 0.1) / 100 for _ in range(2)]
    return attention.LayerPages(keys, values, PAGE, *scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 80), (1, 17, 6)])  # K, G, D
def test_rows_attend_to_their_pages(dtype, is_int8, shape):
    num_kv_heads, group, head_dim = shape
    lengths = [1, 15, 64, 200, 0]
    counts = [-(-length // PAGE) for length in lengths]
    pages = random_pages(sum(counts) + 2, num_kv_heads, head_dim, dtype, is_int8=is_int8)
    ids = torch.randperm(sum(counts) + 2, generator=GENERATOR).tolist()
    table = torch.full((len(lengths), max(counts) + 1), 10**6, dtype=torch.int32)  # what must not be read
    for row, count in enumerate(counts):
        table[row, :count] = torch.tensor([ids.pop() for _ in range(count)])
    q = normal(len(lengths), num_kv_heads * group, head_dim, dtype=dtype)
    arguments = (q, pages, table.to(DEVICE), torch.tensor(lengths, dtype=torch.int32).to(DEVICE))
    expected = attention.attend_rows_twin(*arguments, scale=head_dim**-0.5)
    close(attention.attend_rows(*arguments, scale=head_dim**-0.5), expected)
    assert (expected[-1] == 0).all()


@pytest.mark.parametrize("num_splits", [1, 4, 32])
def test_any_number_of_ranges_gives_the_same(num_splits):
    from internlm2.kernels.gpu import attention_triton

    pages = random_pages(14, 1, 64, torch.float32, is_int8=False)
    table = torch.randperm(14, generator=GENERATOR).to(torch.int32)[None].to(DEVICE)
    q, length = normal(1, 3, 64) * 3, torch.tensor([217], dtype=torch.int32, device=DEVICE)
    found = attention_triton.attend_rows(q, pages, table, length, scale=0.125, num_splits=num_splits)
    close(found, attention.attend_rows_twin(q, pages, table, length, scale=0.125))
    again = attention_triton.attend_rows(q, pages, table, length, scale=0.125, num_splits=num_splits)
    assert torch.equal(found, again)


def test_a_bad_query_or_key_spoils_only_rows_that_see_it():
    pages = random_pages(4, 1, 16, torch.float32, is_int8=False)
    table = torch.tensor([[0, 1], [2, 3], [2, 3]], dtype=torch.int32, device=DEVICE)
    q = normal(3, 2, 16)
    q[1, 0] = torch.nan
    pages.keys[20] = torch.nan
    lengths = torch.tensor([21, 32, 32], dtype=torch.int32, device=DEVICE)
    out = attention.attend_rows(q, pages, table, lengths, scale=1.0)
    assert out[0].isnan().all()
    assert out[1, 0].isnan().all()
    assert out[1, 1].isfinite().all()
    assert out[2].isfinite().all()
    assert attention.attend_rows(q, pages, table, lengths - 1, scale=1.0)[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (3, 1000)])
@pytest.mark.parametrize("has_add", [False, True])
def test_norm(dtype, shape, has_add):
    x, factors = normal(*shape, dtype=dtype) * 3, normal(shape[1], dtype=dtype)
    add = normal(*shape, dtype=dtype) if has_add else None
    expected = elementwise.rms_norm_twin(x, factors, eps=1e-5, add=add)
    found = elementwise.rms_norm(x, factors, eps=1e-5, add=add)
    if runs_exactly(dtype):
        assert torch.equal(found[0], expected[0])
    close(found[0], expected[0])
    close(found[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (2, 3000)])
def test_swiglu(dtype, shape):
    x = normal(*shape, dtype=dtype) * 4
    close(elementwise.swiglu(x), elementwise.swiglu_twin(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 80), (3, 2, 6)])  # K, G, D
def test_rotation_and_writing(dtype, is_int8, shape):
    num_kv_heads, group, head_dim = shape
    qkv = normal(5, num_kv_heads * (group + 2) * head_dim, dtype=dtype)
    angles = normal(5, head_dim // 2) * 10
    angles = torch.cat((angles, angles), dim=-1)
    slots = torch.tensor([3, 40, -1, 17, 0], device=DEVICE)
    results = []
    for function in (elementwise.rotate_and_store, elementwise.rotate_and_store_twin):
        GENERATOR.manual_seed(1)
        pages = random_pages(3, num_kv_heads, head_dim, dtype, is_int8=is_int8)
        results.append((function(qkv, angles.cos(), angles.sin(), pages, slots), pages))
    (found, ours), (expected, theirs) = results
    close(found, expected)
    if is_int8:
        assert (ours.keys.int() - theirs.keys.int()).abs().max() <= 1  # sums may be fused
        assert torch.equal(ours.values, theirs.values)
        torch.testing.assert_close(ours.key_scales, theirs.key_scales, rtol=1e-2, atol=0)
        assert torch.equal(ours.value_scales, theirs.value_scales)
    else:
        close(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


def test_a_key_that_is_not_finite_is_remembered_in_its_scale():
    pages = random_pages(1, 1, 8, torch.float32, is_int8=True)
    qkv = normal(1, 24)
    qkv[0, 9], qkv[0, 17] = torch.nan, torch.inf
    flat = torch.zeros(1, 8, device=DEVICE)
    elementwise.rotate_and_store(qkv, flat + 1, flat, pages, torch.tensor([2], device=DEVICE))
    assert not pages.key_scales[2].isfinite().any()
    assert not pages.value_scales[2].isfinite().any()
    assert pages.key_scales[3].isfinite().all()


def random_weight(rows: int, columns: int, group: int, kind: str) -> weight.GpuWeight:
    num_groups = -(-columns // group)
    scales = (torch.rand(rows, num_groups, generator=GENERATOR) + 0.5).to(torch.bfloat16)
    if kind == "int8":
        q = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=GENERATOR)
        return weight.pack(q, scales, None, group=group).to(DEVICE)
    q = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=GENERATOR)
    zeros = torch.randint(0, 241, (rows, num_groups), dtype=torch.uint8, generator=GENERATOR)
    return weight.pack(q, scales, zeros if kind == "zeros" else None, group=group).to(DEVICE)


@pytest.mark.parametrize("kind", ["int8", "int4", "zeros"])
@pytest.mark.parametrize("shape", [(1, 32, 32), (70, 96, 32), (33, 300, 64), (40, 288, 96)])
def test_products_of_few_rows(kind, shape):
    packed = random_weight(*shape, kind)
    for num_x, dtype in zip((1, 3, 17), DTYPES, strict=True):
        x = normal(num_x, shape[1], dtype=dtype)
        expected = linear.linear_twin(x, packed)
        tolerance = TOLERANCE[dtype] * expected.float().abs().max().item()
        torch.testing.assert_close(linear.linear(x, packed), expected, rtol=TOLERANCE[dtype], atol=tolerance)


@pytest.mark.parametrize(("block_rows", "num_splits"), [(16, 1), (64, 2), (32, 7)])
def test_any_plan_gives_the_same_product(block_rows, num_splits):
    from internlm2.kernels.gpu import linear_triton

    packed = random_weight(50, 420, 32, "zeros")
    x = normal(5, 840)[:, ::2]  # rows that are not contiguous
    found = linear_triton.linear(x, packed, linear.Plan(block_rows, num_splits))
    torch.testing.assert_close(found, linear.linear_twin(x, packed), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kind", ["int8", "int4", "zeros"])
@pytest.mark.parametrize("shape", [(1, 32, 32), (33, 300, 64), (40, 288, 96)])
def test_unpacking(kind, shape):
    packed = random_weight(*shape, kind)
    for dtype in DTYPES:
        found = linear.dequantize(packed, dtype)
        if runs_exactly(dtype):
            assert torch.equal(found, weight.unpack(packed, dtype))
        torch.testing.assert_close(found, weight.unpack(packed, dtype), rtol=TOLERANCE[dtype], atol=0)


NO_E4M3 = pytest.mark.skipif(
    DEVICE.type == "cuda" and torch.cuda.get_device_capability() < fp8.LEAST_CAPABILITY,
    reason="this GPU has no e4m3",
)


@NO_E4M3
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (5, 1000)])
def test_rows_to_e4m3(dtype, shape):
    x = normal(*shape, dtype=dtype) * 10
    x[0] = 0
    found, scales = fp8.quantize_rows(x)
    expected, expected_scales = fp8.quantize_rows_twin(x)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    ours, theirs = found.float(), expected.float()
    if DEVICE.type != "cuda":
        # NOTE: Triton's interpreter loses the carry into the exponent when it rounds up to a power of two.
        is_power = torch.frexp(theirs).mantissa.abs() == 0.5
        ours, theirs = ours[~is_power], theirs[~is_power]
    assert (ours != theirs).float().mean() < 0.01  # quotients on the edge between two numbers
    torch.testing.assert_close(ours, theirs, rtol=0.15, atol=0)


@NO_E4M3
@pytest.mark.skipif(DEVICE.type != "cuda", reason="torch multiplies e4m3 by rows on a GPU only")
@pytest.mark.parametrize("num_x", [1, 5, 130])
def test_products_in_e4m3(num_x):
    packed = fp8.pack(normal(96, 256, dtype=torch.bfloat16))
    x = normal(num_x, 256, dtype=torch.bfloat16)
    torch.testing.assert_close(fp8.linear(x, packed), fp8.linear_twin(x, packed), rtol=2e-2, atol=0.2)
