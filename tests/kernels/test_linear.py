"""C++ = twin, at every instruction level; twin = float64 oracle on what the packed weights mean."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from internlm2.kernels import linear
from internlm2.kernels.library import Library, library
from internlm2.kernels.twin import linear_twin, quantise_rows
from kernels.kernel_cases import NAMES, TURNED, hadamard, random_case

ODD = [(1, 1), (33, 100), (70, 576), (129, 40)]  # rows, columns: none a multiple of its block
F32 = torch.float32


def close(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of the additions in float32."""
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=2e-5 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "columns"), ODD)
def test_kernel_is_the_twin_for_every_number_of_rows(level: str, name: str, rows: int, columns: int) -> None:
    torch.manual_seed(1)
    for group in (32, 128):
        packed = random_case(name, rows, columns, group=group, has_bias=group == 32).packed
        for dtype in (torch.bfloat16, F32):
            x = torch.randn(33, columns).to(dtype)
            expected = linear_twin(x, packed, F32)
            for num_rows in range(1, 34):
                out = linear(
                    x[:num_rows], packed, out_dtype=F32, num_threads=1 + num_rows % 2
                )  # odd and even: both
                close(out, expected[:num_rows])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 16, 33, 80])
def test_gated_kernel_is_the_twin(level: str, name: str, rows: int) -> None:
    packed = random_case(name, rows, 96, is_gated=True, has_bias=True).packed
    x = 3 * torch.randn(13, 96)
    close(linear(x, packed), linear_twin(x, packed, F32))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_gated", [False, True])
def test_twin_is_the_product_with_what_was_packed(name: str, is_gated: bool) -> None:
    """Activations that rounding leaves alone: whole numbers up to 127, of which each group has a 127."""
    case = random_case(name, 70, 100, is_gated=is_gated, has_bias=True)
    x = torch.randint(-127, 128, (5, 100)).float() if name != "bfloat16" else torch.randn(5, 100).bfloat16()
    x[:, ::32] = 127
    x = x / 64
    torch.testing.assert_close(
        linear_twin(x, case.packed, F32).double(), case.product(x), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize(
    ("rows", "columns", "is_gated"), [(33, 96, True), (70, 576, False), (129, 32, False)]
)
def test_turned_activations(level: str, rows: int, columns: int, is_gated: bool, group: int) -> None:
    case = random_case(TURNED, rows, columns, group=group, is_gated=is_gated, has_bias=True)
    x = torch.randint(-127, 128, (33, columns)).float()
    x[:, ::32] = 127
    x = hadamard(x / 64).float()  # so that turning gives what rounding leaves alone
    torch.testing.assert_close(linear(x, case.packed).double(), case.product(x), rtol=1e-4, atol=2e-4)
    x = torch.randn(33, columns)
    for num_rows in (1, 2, 5, 33):
        close(linear(x[:num_rows], case.packed), linear_twin(x[:num_rows], case.packed, F32))


def test_turning_spreads_an_outlier(level: str) -> None:
    """With one large value in each group, plain 8 bits lose far more."""
    x = torch.randn(16, 256)
    x[:, 5::32] = 60.0
    losses = {}
    for name in ("int8", TURNED):
        case = random_case(name, 64, 256)
        expected = case.product(x)
        losses[name] = ((linear(x, case.packed).double() - expected).norm() / expected.norm()).item()
    assert losses[TURNED] < 0.4 * losses["int8"]


@pytest.mark.parametrize("name", NAMES)
def test_rounding_activations_costs_less_than_a_percent(level: str, name: str) -> None:
    case = random_case(name, 64, 512, group=128)
    x = torch.randn(7, 512)
    expected = case.product(x)
    error = (linear(x, case.packed).double() - expected).norm() / expected.norm()
    assert error < (0.0002 if name == "int8-wide" else 0.01)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_its_neighbours_or_threads_bit_by_bit(level: str, name: str) -> None:
    packed = random_case(name, 200, 160, is_gated=True).packed
    x = torch.randn(33, 160).bfloat16()
    together = linear(x, packed, num_threads=2)
    alone = torch.cat([linear(row[None], packed, num_threads=1) for row in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_spoils_its_own_row_only(level: str, name: str, bad: float) -> None:
    packed = random_case(name, 40, 100).packed
    x = torch.randn(5, 100)
    clean = linear(x, packed)
    x[2, 99] = bad
    out = linear(x, packed)
    assert not out[2].isfinite().any()
    assert torch.equal(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
    assert not linear_twin(x, packed, F32)[2].isfinite().any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-20, 1e20, 1e37])
def test_very_small_and_very_large_activations(level: str, name: str, size: float) -> None:
    packed = random_case(name, 40, 100).packed
    x = torch.full((2, 100), size)
    x[:, ::3] = -size / 2
    out, expected = linear(x, packed), linear_twin(x, packed, F32)
    scale = max(size, 1e-34)  # vdpbf16ps takes numbers below 1e-38 as zeros, also products
    torch.testing.assert_close(out / scale, expected / scale, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_misaligned_and_strided_activations(level: str, name: str) -> None:
    packed = random_case(name, 40, 100).packed
    for dtype in (torch.bfloat16, F32):
        wide = torch.randn(6, 4, 111).to(dtype)
        x = wide[:, 1, 3:103]  # rows far apart, none at a multiple of 16 bytes
        assert torch.equal(linear(x, packed), linear(x.contiguous(), packed))
        columns = torch.randn(100, 6).to(dtype).T  # not even the columns are neighbours
        assert torch.equal(linear(columns, packed), linear(columns.contiguous(), packed))


def test_leading_dimensions_and_dtypes_are_kept(level: str) -> None:
    packed = random_case("int8", 40, 100).packed
    x = torch.randn(2, 3, 100)
    assert linear(x, packed).shape == (2, 3, 40)
    assert linear(x, packed).dtype == F32
    assert linear(x.bfloat16(), packed).dtype == torch.bfloat16
    rounded = linear(x, packed, out_dtype=torch.bfloat16)
    assert torch.equal(rounded, linear(x, packed).bfloat16())
    assert linear(torch.randn(0, 100), packed).shape == (0, 40)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0x7FC00000])
def test_every_kind_of_nan_stays_nan(level: str, bits: int) -> None:
    """Rounded without care, the first would become infinite and the second zero."""
    x = torch.zeros(1, 100)
    x.view(torch.int32)[0, 0] = bits
    for name in NAMES:
        packed = random_case(name, 40, 100).packed
        assert linear(x, packed, out_dtype=torch.bfloat16).isnan().all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(NAMES),
    rows=st.integers(1, 150),
    columns=st.integers(1, 300),
    num_rows=st.integers(1, 40),
    group=st.sampled_from([32, 64, 128, 256]),
    is_gated=st.booleans(),
    has_bias=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, F32]),
    num_threads=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_any_shape(
    level: str,
    *,
    name: str,
    rows: int,
    columns: int,
    num_rows: int,
    group: int,
    is_gated: bool,
    has_bias: bool,
    dtype: torch.dtype,
    num_threads: int,
    seed: int,
) -> None:
    case = random_case(name, rows, columns, group=group, is_gated=is_gated, has_bias=has_bias, seed=seed)
    x = torch.randn(num_rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    out = linear(x, case.packed, out_dtype=F32, num_threads=num_threads)
    close(out, linear_twin(x, case.packed, F32))


def test_without_the_library_the_twin_computes(built: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = random_case("int4", 40, 100).packed
    x = torch.randn(2, 3, 100).bfloat16()
    expected = linear(x, packed)
    monkeypatch.setattr("internlm2.kernels.dispatch.library", lambda: None)
    out = linear(x, packed)
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=0.01, atol=0.01)
    assert library() is built


def test_activations_are_rounded_by_the_largest_of_their_group() -> None:
    q, scale = quantise_rows(torch.tensor([[1.0, -2.0, 0.5] + [0.0] * 29 + [8.0]]), 32)
    assert q[0, 0, :3].tolist() == [64, -127, 32]  # 63.5 goes to the even 64; 31.75 to 32
    assert q[0, 1, 0] == 127
    torch.testing.assert_close(scale, torch.tensor([[2 / 127, 8 / 127]]))
