"""Rounding weights: what comes back, how wrong it is, and what is refused."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from internlm2.errors import RequestError
from internlm2.kernels import turn, unpack
from internlm2.quant.weight import (
    FORMATS,
    WeightFormat,
    fitting_group,
    parse_format,
    quantize_weight,
    round_weight,
)

SYMMETRIC = WeightFormat("int4", 32)
INT8_128 = WeightFormat("int8", 128)
FORMATS_TO_TEST = [FORMATS["int8"], SYMMETRIC, FORMATS["int4"], FORMATS["int4-symmetric"]]


@pytest.mark.parametrize(
    ("fmt", "largest"),
    [(FORMATS["bfloat16"], 0.002), (INT8_128, 0.008), (FORMATS["int4"], 0.08), (SYMMETRIC, 0.09)],
)
def test_the_relative_error_of_normal_weights(fmt: WeightFormat, largest: float) -> None:
    weight = torch.randn(64, 256)
    packed = quantize_weight(weight, fmt)
    error = (unpack(packed) - (turn(weight) if packed.uses_hadamard else weight)).norm() / weight.norm()
    assert largest / 2 < error < largest


@pytest.mark.parametrize("fmt", FORMATS_TO_TEST)
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 200), size=st.floats(1e-6, 1e6), seed=st.integers(0, 99)
)
def test_no_weight_is_off_by_more_than_the_clipped_range_allows(
    fmt: WeightFormat, rows: int, columns: int, size: float, seed: int
) -> None:
    weight = size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    group = fitting_group(columns, fmt.group)
    packed = quantize_weight(weight, fmt)
    back = unpack(packed)
    if packed.uses_hadamard:
        weight = turn(weight)
    padded = torch.nn.functional.pad(weight, (0, -columns % group)).view(rows, -1, group)
    largest = padded.abs().amax(-1, keepdim=True).expand_as(padded).flatten(1)[:, :columns]
    steps = {"int8": 127, "int4": 8}[fmt.kind]
    # Half a step, a bit for the scale's bfloat16; int4 may clip a fifth of the range.
    allowed = largest * (0.51 / steps if fmt.kind == "int8" else 0.36)
    assert ((back - weight).abs() <= allowed).all()


def test_weights_on_the_grid_come_back_exactly() -> None:
    q = torch.randint(-8, 8, (8, 64)).float()
    q[:, ::32] = -8
    assert torch.equal(unpack(quantize_weight(q / 4, SYMMETRIC)), q / 4)
    q = torch.randint(-127, 128, (8, 64)).float()
    q[:, ::32] = 127
    assert torch.equal(unpack(quantize_weight(q / 4, WeightFormat("int8", 32))), q / 4)
    q = torch.randint(0, 16, (8, 64)).float()
    q[:, ::32], q[:, 1::32] = 0, 15
    assert torch.equal(unpack(quantize_weight((q - 3) / 4, FORMATS["int4"])), (q - 3) / 4)


def _on_a_grid(rows: int) -> torch.Tensor:
    """What a 4-bit file with a scale and a minimum for each 32 columns gives."""
    q, scale = torch.randint(0, 16, (rows, 4, 32)).float(), 0.5 + torch.rand(rows, 4, 1)
    q[..., 0], q[..., 1] = 0, 15
    return ((q - 7.5 - torch.randint(-16, 17, (rows, 4, 1)) / 16) * scale.bfloat16().float()).flatten(1)


def test_int4_turns_weights_unless_they_were_in_four_bits_before() -> None:
    plain, grid = torch.randn(96, 128), _on_a_grid(96)
    for name in ("int4", "int4-symmetric"):
        assert quantize_weight(plain, FORMATS[name]).uses_hadamard
        assert not quantize_weight(plain[:, :100], FORMATS[name]).uses_hadamard  # columns do not fit
    packed = quantize_weight(grid, FORMATS["int4"])
    assert not packed.uses_hadamard
    assert torch.allclose(unpack(packed), grid, atol=1e-5)


def test_a_gate_and_its_weight_are_turned_together() -> None:
    plain, grid = torch.randn(1024, 128), _on_a_grid(1024)
    for parts in ((grid, 100 * plain), (100 * plain, grid)):  # the larger one decides
        assert quantize_weight(parts[0], FORMATS["int4"], gate=parts[1]).uses_hadamard
    for parts in ((grid, 0.01 * plain), (0.01 * plain, grid), (grid, grid)):
        assert not quantize_weight(parts[0], FORMATS["int4"], gate=parts[1]).uses_hadamard


def test_bits_count_scales_and_zeros() -> None:
    assert {name: fmt.bits for name, fmt in FORMATS.items()} == {
        "bfloat16": 16, "int8": 8.5, "int4": 4.75, "int4-symmetric": 4.5,
    }  # fmt: skip
    assert WeightFormat("int4", 128).bits == 4.125


@pytest.mark.parametrize("fmt", FORMATS_TO_TEST)
def test_zeros_stay_zeros(fmt: WeightFormat) -> None:
    weight = torch.zeros(4, 64)
    weight[1, :32] = torch.randn(32)
    back = unpack(quantize_weight(weight, fmt))
    assert not back[[0, 2, 3]].any()
    assert not back[1, 32:].any()


@pytest.mark.parametrize("fmt", FORMATS_TO_TEST)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused(fmt: WeightFormat, bad: float) -> None:
    weight = torch.randn(4, 64)
    weight[3, 63] = bad
    with pytest.raises(RequestError, match=r"NaN or infinite.*Is the checkpoint damaged"):
        quantize_weight(weight, fmt)


def test_trying_scales_beats_the_obvious_one() -> None:
    weight = torch.randn(64, 128)
    obvious = weight.view(64, 4, 32).abs().amax(-1, keepdim=True) / 7
    plain = ((weight.view(64, 4, 32) / obvious).round() * obvious).view(64, 128)
    chosen = unpack(quantize_weight(weight, SYMMETRIC))
    assert (chosen - weight).square().sum() < 0.85 * (plain - weight).square().sum()


def test_groups_leave_no_rest_where_possible() -> None:
    assert [fitting_group(columns, 128) for columns in (2048, 576, 96, 100)] == [128, 64, 32, 32]
    q, scales, zeros = round_weight(torch.randn(3, 100), FORMATS["int4"], 32)
    assert q.shape == (3, 100)
    assert zeros is not None
    assert scales.shape == zeros.shape == (3, 4)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(RequestError, match="quantization is 'int3', but must be one of bfloat16, int8, int4"):
        parse_format("int3")
