"""The kernels of `attention.py` in Triton: one block for each row, key/value head and range of keys; then the joining.

All query heads of a group are rows of one small matrix, so each key is read once.
"""

# ruff: noqa: N803, PLR0917 - constants of a kernel are capitals, and Triton takes pointers one by one

import torch
import triton
import triton.language as tl

from internlm2.kernels.gpu.attention import LayerPages
from internlm2.kernels.gpu.available import multiplies_in_float32

_KEYS_AT_ONCE = 64
_LEAST_ROWS = 16  # of a matrix product
_LOG2_E = 1.4426950408889634


def attend_rows(
    q: torch.Tensor,
    pages: LayerPages,
    table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    num_splits: int,
) -> torch.Tensor:
    """See `attention.attend_rows`."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = pages.keys.shape[1]
    group = num_heads // num_kv_heads
    q, table = q.contiguous(), table if table.stride(1) == 1 else table.contiguous()
    assert pages.keys.is_contiguous()
    assert pages.values.is_contiguous()
    out = torch.empty_like(q)
    sums = q.new_empty((num_splits, num_rows, num_heads, head_dim), dtype=torch.float32)
    most, total = q.new_empty((2, num_splits, num_rows, num_heads), dtype=torch.float32)
    block_dim = triton.next_power_of_2(max(head_dim, 16))
    is_int8 = pages.key_scales is not None
    _attend_range[(num_rows, num_kv_heads, num_splits)](
        q,
        pages.keys,
        pages.values,
        pages.key_scales if is_int8 else q,
        pages.value_scales if is_int8 else q,
        table,
        lengths,
        sums,
        most,
        total,
        scale * _LOG2_E,
        table.stride(0),
        num_rows,
        GROUP=group,
        GROUP_ROWS=max(_LEAST_ROWS, triton.next_power_of_2(group)),
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        BLOCK_KEYS=_KEYS_AT_ONCE,
        PAGE_SIZE=pages.page_size,
        NUM_SPLITS=num_splits,
        IS_INT8=is_int8,
        IN_FLOAT32=multiplies_in_float32(q),
        num_warps=4,
        num_stages=2,
    )
    _join_ranges[(num_rows, num_heads)](
        sums,
        most,
        total,
        out,
        num_rows,
        num_heads,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        NUM_SPLITS=num_splits,
        num_warps=4,
    )
    return out


@triton.jit
def _attend_range(
    q,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    lengths,
    sums,
    most_of,
    total_of,
    scale_log2,
    table_stride,
    num_rows,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    IS_INT8: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    dtype: tl.constexpr = tl.float32 if IN_FLOAT32 else q.dtype.element_ty
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    size = tl.cdiv(tl.cdiv(length, NUM_SPLITS), BLOCK_KEYS) * BLOCK_KEYS
    begin = split * size
    end = tl.minimum(begin + size, length)
    heads = tl.arange(0, GROUP_ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    is_head, is_dim = heads < GROUP, dims < HEAD_DIM
    first_head = row * NUM_KV_HEADS * GROUP + head * GROUP
    at = (first_head + heads)[:, None] * HEAD_DIM + dims[None, :]
    inside = is_head[:, None] & is_dim[None, :]
    queries = tl.load(q + at, mask=inside, other=0.0).to(dtype)  # (G, D)
    most = tl.full((GROUP_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_ROWS,), tl.float32)
    acc = tl.zeros((GROUP_ROWS, BLOCK_DIM), tl.float32)
    for start in range(begin, end, BLOCK_KEYS):
        positions = start + tl.arange(0, BLOCK_KEYS)
        is_key = positions < end
        page = tl.load(table + row * table_stride + positions // PAGE_SIZE, mask=is_key, other=0)
        slot = page.to(tl.int64) * PAGE_SIZE + positions % PAGE_SIZE
        index = slot * NUM_KV_HEADS + head
        where = index[:, None] * HEAD_DIM + dims[None, :]
        is_value = is_key[:, None] & is_dim[None, :]
        k = tl.load(keys + where, mask=is_value, other=0).to(dtype)  # (S, D)
        v = tl.load(values + where, mask=is_value, other=0).to(dtype)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale_log2  # (G, S)
        if IS_INT8:
            scores *= tl.load(key_scales + index, mask=is_key, other=0.0)[None, :]
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(most - higher)
        total = total * shrink + tl.sum(weights, 1)
        if IS_INT8:
            weights *= tl.load(value_scales + index, mask=is_key, other=0.0)[None, :]
        acc = acc * shrink[:, None] + tl.dot(weights.to(dtype), v, input_precision="ieee")
        most = higher
    part = split * num_rows * NUM_KV_HEADS * GROUP + first_head + heads
    tl.store(most_of + part, most, mask=is_head)
    tl.store(total_of + part, total, mask=is_head)
    tl.store(sums + part[:, None] * HEAD_DIM + dims[None, :], acc, mask=inside)


@triton.jit
def _join_ranges(
    sums,
    most_of,
    total_of,
    out,
    num_rows,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    own = tl.program_id(0) * num_heads + tl.program_id(1)
    splits = tl.arange(0, NUM_SPLITS)
    dims = tl.arange(0, BLOCK_DIM)
    part = splits * num_rows * num_heads + own
    most = tl.load(most_of + part)
    highest = tl.max(most, 0)
    # A range without keys has -inf, and so has a row without any.
    weights = tl.where(most == float("-inf"), 0.0, tl.exp2(most - highest))
    total = tl.sum(weights * tl.load(total_of + part), 0)
    is_dim = dims < HEAD_DIM
    acc = tl.load(sums + part[:, None] * HEAD_DIM + dims[None, :], mask=is_dim[None, :], other=0.0)
    result = tl.sum(acc * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + own * HEAD_DIM + dims, result.to(out.dtype.element_ty), mask=is_dim)
