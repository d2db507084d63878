"""Rounding that knows what the weights will be multiplied with (GPTQ, arXiv 2210.17323).

What matters is not how far a weight moves but how far the product moves. The inputs of a linear on real text give
H = X^T X; columns are rounded one after the other, and the error of each is made up for by the columns that are not
rounded yet, as far as H says that they carry the same signal. The groups' scales are chosen first, so columns can be
taken in the order of their weight in H without the file having to know.
"""

from dataclasses import dataclass, field

import torch

from internlm2.errors import RequestError
from internlm2.quant.weight import Rounded, WeightFormat, round_weight

DAMPING = 0.01  # of the mean of H's diagonal is added to it, so that it can be inverted
_COLUMNS_AT_ONCE = 128  # corrections reach the columns behind a block in one product


@dataclass
class InputStatistics:
    """The sum of x x^T over all inputs of a linear, (C, C) float32, and how many there were."""

    columns: int
    num_rows: int = 0
    total: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.columns, self.columns)

    def add(self, x: torch.Tensor) -> None:
        """x: (..., C)."""
        rows = x.reshape(-1, self.columns).float()
        self.total.addmm_(rows.T, rows)
        self.num_rows += len(rows)

    def mean(self) -> torch.Tensor:
        """The mean of x x^T, (C, C). Raises RequestError when it is not finite."""
        mean = self.total / max(1, self.num_rows)
        if not mean.isfinite().all():
            raise RequestError(
                "The model gives NaN or infinite values on the calibration text. Is the checkpoint damaged?"
            )
        return mean

    def divided(self, factors: torch.Tensor) -> "InputStatistics":
        """Of the same inputs, each column divided by its factor, (C,)."""
        other = InputStatistics(self.columns)
        other.total = self.total / factors / factors[:, None]
        other.num_rows = self.num_rows
        return other


@torch.no_grad()
def round_calibrated(
    weight: torch.Tensor, fmt: WeightFormat, group: int, statistics: InputStatistics
) -> Rounded:
    """Round (N, C) so that products with inputs like those in `statistics` change least.

    Raises RequestError when weights or inputs are not finite.
    """
    hessian = statistics.mean()
    grid = round_nearest(weight, fmt, group, hessian)
    order = hessian.diagonal().argsort(descending=True)
    rounded = _compensate(weight.float()[:, order], grid, order, _inverse_root(hessian, order))
    grid.q[:, order] = rounded.to(grid.q.dtype)
    return grid


def round_nearest(weight: torch.Tensor, fmt: WeightFormat, group: int, hessian: torch.Tensor) -> Rounded:
    """Round (N, C) to the nearest on scales for which the columns count as much as their inputs do.

    hessian: (C, C), the mean of x x^T. Raises RequestError when a weight is not finite.
    """
    importance = hessian.diagonal()
    importance = importance + importance.mean() * DAMPING
    return Rounded(*round_weight(weight, fmt, group, importance=importance), group)


def _inverse_root(hessian: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The upper triangular R with R^T R = H^-1, of H in the given order of columns and damped until it has one."""
    hessian = hessian[order][:, order]
    damping = max(float(hessian.diagonal().mean()) * DAMPING, 1e-12)
    while True:
        damped = hessian + damping * torch.eye(len(hessian))
        root, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(root), upper=True)
            if not failed and inverse.isfinite().all():
                return inverse
        damping *= 10  # a text much shorter than the matrix is wide


def _compensate(weight: torch.Tensor, grid: Rounded, order: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """The whole numbers of `weight`, (N, C), whose columns and those of `root` stand in `order`. Changes `weight`."""
    is_int8 = grid.q.dtype == torch.int8
    lowest, highest, middle = (-127.0, 127.0, 0.0) if is_int8 else (0.0, 15.0, 8.0)
    group_of = order // grid.group
    scales = grid.scales.float().T.contiguous()  # (groups, N)
    zeros = torch.full_like(scales, middle) if grid.zeros is None else grid.zeros.float().T / 16
    columns = weight.T.contiguous()  # (C, N): a column is a row of memory
    rounded = torch.empty_like(columns)
    for first in range(0, len(columns), _COLUMNS_AT_ONCE):
        end = min(first + _COLUMNS_AT_ONCE, len(columns))
        errors = torch.empty(end - first, columns.shape[1])
        for i in range(first, end):
            scale, zero = scales[group_of[i]], zeros[group_of[i]]
            divisor = scale.where(scale != 0, 1)
            q = (columns[i] / divisor + zero).round_().clamp_(lowest, highest)
            q = q.where(scale != 0, grid.q[:, order[i]].float())
            errors[i - first] = (columns[i] - (q - zero) * scale) / root[i, i]
            rounded[i] = q
            if i + 1 < end:
                columns[i + 1 : end].addr_(root[i, i + 1 : end], errors[i - first], alpha=-1)
        if end < len(columns):
            columns[end:].addmm_(root[first:end, end:].T, errors, alpha=-1)
    return rounded.T
