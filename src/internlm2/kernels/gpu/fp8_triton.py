"""Rows to e4m3 in one Triton kernel: the largest magnitude of a row, then its quotients."""

# ruff: noqa: N803 - constants of a kernel are capitals

import torch
import triton
import triton.language as tl

from internlm2.kernels.gpu.fp8 import DTYPE


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fp8.quantize_rows`."""
    num_rows, size = x.shape
    out = torch.empty((num_rows, size), dtype=DTYPE, device=x.device)
    scales = torch.empty((num_rows, 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(size)
    _quantize_rows[(num_rows,)](x.contiguous(), out, scales, size, BLOCK=block, num_warps=8)
    return out, scales


@triton.jit
def _quantize_rows(x, out, scales, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    values = tl.load(x + row * size + columns, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), 0)
    scale = tl.maximum(largest / 448.0, 1e-20)
    scale += tl.sum(values * 0.0, 0)  # NOTE: a maximum does not see NaN; this makes the scale NaN
    quotient = tl.minimum(tl.maximum(values / scale, -448.0), 448.0)
    tl.store(out + row * size + columns, quotient.to(tl.float8e4nv), mask=inside)
    tl.store(scales + row, scale)
