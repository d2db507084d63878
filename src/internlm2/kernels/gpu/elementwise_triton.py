"""The kernels of `elementwise.py` in Triton."""

# ruff: noqa: N803, PLR0917 - constants of a kernel are capitals, and Triton takes pointers one by one

import torch
import triton
import triton.language as tl

from internlm2.kernels.gpu.attention import LayerPages

_VALUES_AT_ONCE = 1024
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves a float32 no bits behind the point


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, add: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `elementwise.rms_norm`."""
    num_rows, size = x.shape
    x = x.contiguous()
    stream = x if add is None else torch.empty_like(x)
    out = torch.empty_like(x)
    block = triton.next_power_of_2(size)
    _rms_norm[(num_rows,)](
        x,
        x if add is None else add.contiguous(),
        weight,
        stream,
        out,
        size,
        eps,
        HAS_ADD=add is not None,
        BLOCK=block,
        num_warps=8 if block >= 4096 else 4,
    )
    return stream, out


@triton.jit
def _rms_norm(x, add, weight, stream, out, size, eps, HAS_ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    dtype = out.dtype.element_ty
    values = tl.load(x + row + columns, mask=inside, other=0.0)
    if HAS_ADD:
        more = tl.load(add + row + columns, mask=inside, other=0.0)
        values = (values.to(tl.float32) + more.to(tl.float32)).to(dtype)
        tl.store(stream + row + columns, values, mask=inside)
    values = values.to(tl.float32)
    mean = tl.sum(values * values, 0) / size
    values = (values * tl.rsqrt(mean + eps)).to(dtype).to(tl.float32)
    factors = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + columns, (values * factors).to(dtype), mask=inside)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """See `elementwise.swiglu`."""
    num_rows, both = x.shape
    out = x.new_empty((num_rows, both // 2))
    grid = (num_rows, triton.cdiv(both // 2, _VALUES_AT_ONCE))
    _swiglu[grid](x.contiguous(), out, both // 2, BLOCK=_VALUES_AT_ONCE, num_warps=4)
    return out


@triton.jit
def _swiglu(x, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate = tl.load(x + row * 2 * size + columns, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + row * 2 * size + size + columns, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * value
    tl.store(out + row * size + columns, result.to(out.dtype.element_ty), mask=inside)


def rotate_and_store(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pages: LayerPages, slots: torch.Tensor
) -> torch.Tensor:
    """See `elementwise.rotate_and_store`."""
    num_rows = len(qkv)
    num_kv_heads, head_dim = pages.keys.shape[1:]
    group = qkv.shape[1] // (num_kv_heads * head_dim) - 2
    queries = qkv.new_empty((num_rows, num_kv_heads * group, head_dim))
    is_int8 = pages.key_scales is not None
    _rotate_and_store[(num_rows, num_kv_heads)](
        qkv.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        queries,
        pages.keys,
        pages.values,
        pages.key_scales if is_int8 else cos,
        pages.value_scales if is_int8 else cos,
        slots,
        GROUP=group,
        HEADS=triton.next_power_of_2(group + 2),
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        IS_INT8=is_int8,
        num_warps=4,
    )
    return queries


@triton.jit
def _rotate_and_store(
    qkv,
    cos,
    sin,
    queries,
    keys,
    values,
    key_scales,
    value_scales,
    slots,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    IS_INT8: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.arange(0, HEADS)  # G queries, the key, the value
    halves = tl.arange(0, BLOCK_HALF)
    is_half = halves < HALF
    inside = (heads < GROUP + 2)[:, None] & is_half[None, :]
    dtype = queries.dtype.element_ty
    at = ((row * NUM_KV_HEADS + head) * (GROUP + 2) + heads)[:, None] * (2 * HALF) + halves[None, :]
    first = tl.load(qkv + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(qkv + at + HALF, mask=inside, other=0.0).to(tl.float32)
    is_turned = (heads <= GROUP)[:, None]
    c = tl.load(cos + row * 2 * HALF + halves, mask=is_half, other=1.0)[None, :]
    s = tl.load(sin + row * 2 * HALF + halves, mask=is_half, other=0.0)[None, :]
    low = tl.where(is_turned, first * c - second * s, first).to(dtype)
    high = tl.where(is_turned, second * c + first * s, second).to(dtype)
    is_query = inside & (heads < GROUP)[:, None]
    target = ((row * NUM_KV_HEADS + head) * GROUP + heads)[:, None] * (2 * HALF) + halves[None, :]
    tl.store(queries + target, low, mask=is_query)
    tl.store(queries + target + HALF, high, mask=is_query)
    slot = tl.load(slots + row)
    index = slot * NUM_KV_HEADS + head
    where = index * (2 * HALF) + halves[None, :] + heads[:, None] * 0
    is_key = inside & (heads == GROUP)[:, None] & (slot >= 0)
    is_value = inside & (heads == GROUP + 1)[:, None] & (slot >= 0)
    if IS_INT8:
        low32, high32 = low.to(tl.float32), high.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(low32), 1), tl.max(tl.abs(high32), 1))
        scale = tl.maximum(tl.div_rn(largest, tl.full((HEADS,), 127.0, tl.float32)), 1e-20)
        # NOTE: a maximum does not see NaN; this makes the scale NaN.
        scale += tl.sum(low32 * 0.0 + high32 * 0.0, 1)
        divisor = tl.broadcast_to(scale[:, None], (HEADS, BLOCK_HALF))
        low8 = ((tl.div_rn(low32, divisor) + _ROUND) - _ROUND).to(tl.int8)
        high8 = ((tl.div_rn(high32, divisor) + _ROUND) - _ROUND).to(tl.int8)
        tl.store(keys + where, low8, mask=is_key)
        tl.store(keys + where + HALF, high8, mask=is_key)
        tl.store(values + where, low8, mask=is_value)
        tl.store(values + where + HALF, high8, mask=is_value)
        tl.store(key_scales + index + heads * 0, scale, mask=(heads == GROUP) & (slot >= 0))
        tl.store(value_scales + index + heads * 0, scale, mask=(heads == GROUP + 1) & (slot >= 0))
    else:
        tl.store(keys + where, low.to(keys.dtype.element_ty), mask=is_key)
        tl.store(keys + where + HALF, high.to(keys.dtype.element_ty), mask=is_key)
        tl.store(values + where, low.to(values.dtype.element_ty), mask=is_value)
        tl.store(values + where + HALF, high.to(values.dtype.element_ty), mask=is_value)
