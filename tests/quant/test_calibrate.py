"""Rounding with compensation: against the method's own formulas in plain float64, and what it is for."""

import pytest
import torch

from internlm2.errors import RequestError
from internlm2.quant.calibrate import DAMPING, InputStatistics, round_calibrated
from internlm2.quant.weight import Rounded, WeightFormat, round_weight

FORMATS = [
    WeightFormat("int4", 32, has_zeros=True, whole_zeros=True),
    WeightFormat("int4", 32),
    WeightFormat("int8", 32),
]


def correlated(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    sizes = torch.rand(columns, generator=generator) * 3 + 0.1
    return torch.randn(rows, columns, generator=generator) @ mixing * sizes


def statistics_of(x: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(x.shape[1])
    for part in x.split(7):
        statistics.add(part[None])
    return statistics


def plain(weight: torch.Tensor, fmt: WeightFormat) -> Rounded:
    return Rounded(*round_weight(weight, fmt, fmt.group), fmt.group)


def one_column_at_a_time(weight, grid: Rounded, hessian, lowest: int, highest: int) -> torch.Tensor:
    """Optimal brain surgeon, column by column, with the inverse made anew for the columns that are left."""
    weight, hessian = weight.double().clone(), hessian.double()
    order = hessian.diagonal().argsort(descending=True).tolist()
    hessian = hessian + hessian.diagonal().mean() * DAMPING * torch.eye(len(hessian), dtype=torch.float64)
    found = torch.zeros_like(weight)
    middle = 0 if grid.kind == "int8" else 8
    for position, column in enumerate(order):
        left = order[position:]
        inverse = torch.linalg.inv(hessian[left][:, left])
        scale = grid.scales[:, column // grid.group].double()
        zero = (
            torch.full_like(scale, middle)
            if grid.zeros is None
            else grid.zeros[:, column // grid.group].double() / 16
        )
        found[:, column] = (weight[:, column] / scale + zero).round().clamp(lowest, highest)
        error = (weight[:, column] - (found[:, column] - zero) * scale) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0][None]
    return found


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("columns", [64, 160])
def test_the_whole_numbers_are_those_of_the_surgeon(fmt, columns):
    x = correlated(400, columns)
    weight = torch.randn(24, columns, generator=torch.Generator().manual_seed(5))
    found = round_calibrated(weight, fmt, 32, statistics_of(x))
    limits = (-127, 127) if fmt.kind == "int8" else (0, 15)
    expected = one_column_at_a_time(weight, found, (x.T @ x) / len(x), *limits)
    # A tie that float32 breaks differently changes what follows in that row.
    assert (found.q == expected).float().mean() > 0.99
    assert (found.q == expected).all(1).float().mean() > 0.7


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_products_change_less_than_with_plain_rounding(fmt):
    x = correlated(2000, 256)
    weight = torch.randn(48, 256)
    found = round_calibrated(weight, fmt, 32, statistics_of(x))
    new = correlated(500, 256)
    new = torch.cat((new, x[:500]))
    losses = [((new @ (r.values() - weight).T).norm()).item() for r in (found, plain(weight, fmt))]
    assert losses[0] < 0.75 * losses[1]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_inputs_that_say_nothing_give_plain_rounding(fmt):
    weight = torch.randn(16, 64)
    statistics = InputStatistics(64)
    statistics.add(torch.eye(64) * 8)
    found = round_calibrated(weight, fmt, 32, statistics)
    expected = plain(weight, fmt)
    assert torch.equal(found.q, expected.q)
    assert torch.equal(found.scales, expected.scales)


def test_a_text_shorter_than_the_matrix_is_wide_and_dead_columns_are_fine():
    x = correlated(20, 128)
    x[:, 5] = 0
    weight = torch.randn(8, 128)
    weight[3] = 0
    found = round_calibrated(weight, FORMATS[0], 32, statistics_of(x)).values()
    assert found.isfinite().all()
    assert (found[3] == 0).all()
    # As every weight: a step and what clipping takes (test_weight.py has the same bound).
    assert ((found[:, 5] - weight[:, 5]).abs() <= 0.36 * weight[:, :32].abs().amax(1)).all()


def test_inputs_that_are_not_finite_are_told():
    x = torch.ones(4, 64)
    x[2, 3] = torch.inf
    with pytest.raises(
        RequestError, match=r"NaN or infinite values on the calibration text. Is the checkpoint damaged"
    ):
        round_calibrated(torch.randn(4, 64), FORMATS[0], 32, statistics_of(x))


def test_rescaled_statistics_are_those_of_rescaled_inputs():
    x = correlated(50, 64)
    factors = torch.rand(64) + 0.5
    torch.testing.assert_close(statistics_of(x).divided(factors).mean(), statistics_of(x / factors).mean())
