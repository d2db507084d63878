"""out = x W^T with weights in int8 or int4 on a GPU.

Few rows: one kernel reads the packed weights once, multiplies whole numbers as they are and scales each group's sums.
More rows: the weights are unpacked to the dtype of x, which many rows pay for, and torch multiplies.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from internlm2.kernels.gpu.available import num_multiprocessors, runs_triton
from internlm2.kernels.gpu.weight import GpuWeight, unpack

FEW_ROWS = 64
_MOST_SPLITS = 8
_LEAST_TILES = 4  # of a range of columns


@dataclass(frozen=True)
class Plan:
    """How a product of few rows is cut. block_rows: of the weights, one block's. num_splits: ranges of columns."""

    block_rows: int
    num_splits: int


def linear(x: torch.Tensor, weight: GpuWeight, *, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x: (M, C) bfloat16, float16 or float32 -> (M, weight.rows) of the same dtype; sums are float32."""
    assert x.shape[1] == weight.columns, (x.shape, weight.columns)
    if len(x) > FEW_ROWS:
        out = F.linear(x, dequantize(weight, x.dtype))
    elif runs_triton(x):
        from internlm2.kernels.gpu import linear_triton

        num_tiles = len(weight.data)
        plan = plan_product(weight.rows, num_tiles, num_multiprocessors(x.device))
        out = linear_triton.linear(x, weight, plan)
    else:
        out = linear_twin(x, weight)
    return out if bias is None else out + bias


def linear_twin(x: torch.Tensor, weight: GpuWeight) -> torch.Tensor:
    """As `linear`, in float32."""
    return F.linear(x.float(), unpack(weight)).to(x.dtype)


def dequantize(weight: GpuWeight, dtype: torch.dtype) -> torch.Tensor:
    """The matrix again, (N, C), as `weight.unpack`."""
    if not runs_triton(weight.data):
        return unpack(weight, dtype)
    from internlm2.kernels.gpu import linear_triton

    return linear_triton.dequantize(weight, dtype)


def plan_product(rows: int, num_tiles: int, num_sms: int) -> Plan:
    """Enough blocks for all multiprocessors: by rows if these suffice, else also by ranges of columns."""
    block_rows = 64 if rows >= 64 * num_sms else 32
    blocks = -(-rows // block_rows)
    wanted = -(-2 * num_sms // blocks)
    return Plan(block_rows, max(1, min(wanted, _MOST_SPLITS, num_tiles // _LEAST_TILES)))
