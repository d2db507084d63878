"""The kernels of `linear.py` in Triton.

The product is formed as W x^T, so that unpacked weights stay in registers as the first factor, on tensor cores.
"""

# ruff: noqa: N803, PLR0917 - constants of a kernel are capitals, and Triton takes pointers one by one

import torch
import triton
import triton.language as tl

from internlm2.kernels.gpu.available import multiplies_in_float32
from internlm2.kernels.gpu.linear import Plan
from internlm2.kernels.gpu.weight import GpuWeight

_LEAST_COLUMNS = 16  # of a product on tensor cores
_JOINED_AT_ONCE = 1024


def linear(x: torch.Tensor, weight: GpuWeight, plan: Plan) -> torch.Tensor:
    """See `linear.linear`. x: (M, C), M at least 1."""
    num_rows = len(x)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty((num_rows, weight.rows))
    block_x = min(64, max(_LEAST_COLUMNS, triton.next_power_of_2(num_rows)))
    splits = plan.num_splits
    parts = x.new_empty((splits, num_rows, weight.rows), dtype=torch.float32) if splits > 1 else out
    grid = (triton.cdiv(weight.rows, plan.block_rows), splits, triton.cdiv(num_rows, block_x))
    _linear[grid](
        x,
        weight.data,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        parts,
        num_rows,
        weight.rows,
        weight.columns,
        len(weight.data),
        x.stride(0),
        IS_INT4=weight.is_int4,
        HAS_ZEROS=weight.zeros is not None,
        GROUP=weight.group,
        BLOCK_ROWS=plan.block_rows,
        BLOCK_X=block_x,
        NUM_SPLITS=splits,
        IN_FLOAT32=multiplies_in_float32(x),
        num_warps=4,
        num_stages=4,
    )
    if splits > 1:
        size = num_rows * weight.rows
        _join[(triton.cdiv(size, _JOINED_AT_ONCE),)](
            parts, out, size, NUM_SPLITS=splits, BLOCK=_JOINED_AT_ONCE, num_warps=4
        )
    return out


@triton.jit
def _linear(
    x,
    data,
    scales,
    zeros,
    out,
    num_x,
    num_rows,
    num_columns,
    num_tiles,
    x_stride,
    IS_INT4: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    dtype: tl.constexpr = tl.float32 if IN_FLOAT32 else x.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    split = tl.program_id(1)
    xs = tl.program_id(2) * BLOCK_X + tl.arange(0, BLOCK_X)
    inner = tl.arange(0, GROUP)
    is_row, is_x = rows < num_rows, xs < num_x
    tiles = tl.cdiv(num_tiles, NUM_SPLITS)
    first = split * tiles
    acc = tl.zeros((BLOCK_ROWS, BLOCK_X), tl.float32)
    for tile in range(first, tl.minimum(first + tiles, num_tiles)):
        at = (rows.to(tl.int64) + tile * num_rows)[:, None] * GROUP + inner[None, :]
        q = tl.load(data + at, mask=is_row[:, None], other=0)  # (rows, group)
        for half in tl.static_range(2 if IS_INT4 else 1):
            group = tile * (2 if IS_INT4 else 1) + half
            columns = group * GROUP + inner
            where = xs[None, :] * x_stride + columns[:, None]
            inside = is_x[None, :] & (columns < num_columns)[:, None]
            xt = tl.load(x + where, mask=inside, other=0.0).to(dtype)  # (group, x)
            numbers = ((q >> (4 * half)) & 15) if IS_INT4 else q
            product = tl.dot(numbers.to(dtype), xt, input_precision="ieee")  # (rows, x)
            of_group = group * num_rows + rows
            if IS_INT4:
                if HAS_ZEROS:
                    zero = tl.load(zeros + of_group, mask=is_row, other=0).to(tl.float32) * 0.0625
                else:
                    zero = tl.full((BLOCK_ROWS,), 8.0, tl.float32)
                product -= zero[:, None] * tl.sum(xt.to(tl.float32), 0)[None, :]
            acc += product * tl.load(scales + of_group, mask=is_row, other=0.0).to(tl.float32)[:, None]
    target = (split * num_x + xs)[None, :] * num_rows + rows[:, None]
    tl.store(out + target, acc.to(out.dtype.element_ty), mask=is_row[:, None] & is_x[None, :])


@triton.jit
def _join(parts, out, size, NUM_SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        total += tl.load(parts + split * size + at, mask=inside, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def dequantize(weight: GpuWeight, dtype: torch.dtype) -> torch.Tensor:
    """See `linear.dequantize`."""
    out = torch.empty((weight.rows, weight.columns), dtype=dtype, device=weight.data.device)
    block_rows = max(1, 2048 // weight.group)
    _dequantize[(len(weight.data), triton.cdiv(weight.rows, block_rows))](
        weight.data,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        out,
        weight.rows,
        weight.columns,
        IS_INT4=weight.is_int4,
        HAS_ZEROS=weight.zeros is not None,
        GROUP=weight.group,
        BLOCK_ROWS=block_rows,
        num_warps=4,
    )
    return out


@triton.jit
def _dequantize(
    data,
    scales,
    zeros,
    out,
    num_rows,
    num_columns,
    IS_INT4: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    tile = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inner = tl.arange(0, GROUP)
    is_row = rows < num_rows
    at = (tile.to(tl.int64) * num_rows + rows)[:, None] * GROUP + inner[None, :]
    q = tl.load(data + at, mask=is_row[:, None], other=0)
    for half in tl.static_range(2 if IS_INT4 else 1):
        group = tile * (2 if IS_INT4 else 1) + half
        of_group = group.to(tl.int64) * num_rows + rows
        scale = tl.load(scales + of_group, mask=is_row, other=0.0).to(tl.float32)
        numbers = (((q >> (4 * half)) & 15) if IS_INT4 else q).to(tl.float32)
        if IS_INT4:
            if HAS_ZEROS:
                numbers -= tl.load(zeros + of_group, mask=is_row, other=0).to(tl.float32)[:, None] * 0.0625
            else:
                numbers -= 8.0
        columns = group * GROUP + inner
        inside = is_row[:, None] & (columns < num_columns)[None, :]
        target = rows[:, None].to(tl.int64) * num_columns + columns[None, :]
        tl.store(out + target, (numbers * scale[:, None]).to(out.dtype.element_ty), mask=inside)
