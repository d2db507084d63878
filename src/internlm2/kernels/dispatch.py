"""out = x W^T with a packed weight: the C++ kernel where it is built, else the twin."""

import torch

from internlm2.kernels.library import library
from internlm2.kernels.packed import PackedWeight
from internlm2.kernels.twin import linear_twin

_ELEMENTS = {torch.bfloat16: 0, torch.float32: 1}  # numbered as in layout.h


def linear(
    x: torch.Tensor,
    weight: PackedWeight,
    *,
    out_dtype: torch.dtype | None = None,
    num_threads: int | None = None,
) -> torch.Tensor:
    """x: (..., C) bfloat16 or float32 on the CPU -> (..., weight.rows) of `out_dtype` (default: as x).

    Weights in bfloat16: x is rounded to bfloat16. Weights in int8 or int4: every `weight.group` values of x are
    rounded to int8. Sums are float32. A row of the result does not depend on the other rows, bit by bit; a value that
    is not finite makes its row NaN or infinite and no other. num_threads: default torch.get_num_threads().
    """
    out_dtype = out_dtype or x.dtype
    assert x.shape[-1] == weight.columns, (x.shape, weight.columns)
    assert x.device.type == "cpu", x.device
    rows = x.reshape(-1, weight.columns)
    built = library()
    if built is None:
        return linear_twin(rows, weight, out_dtype).view(*x.shape[:-1], weight.rows)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty((*x.shape[:-1], weight.rows), dtype=out_dtype)
    failed = built.linear(
        weight.pointer,
        rows.data_ptr(),
        _ELEMENTS[x.dtype],
        len(rows),
        rows.stride(0),
        out.data_ptr(),
        _ELEMENTS[out_dtype],
        weight.rows,
        num_threads or torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"No memory for {len(rows)} rounded rows of {weight.columns} values.")
    return out
