"""The same results in plain torch: what tests hold the C++ against, and what runs where there is no compiler."""

import torch
import torch.nn.functional as F

from internlm2.kernels.packed import BLOCK_ROWS, PackedWeight, stored_halves, turn, unpack

_ROWS_AT_ONCE = 128 * BLOCK_ROWS  # unpacked weights: a few megabytes at a time


def linear_twin(x: torch.Tensor, weight: PackedWeight, out_dtype: torch.dtype) -> torch.Tensor:
    """x: (M, C) -> (M, weight.rows) of `out_dtype`; activations rounded as the kernels do, sums in float32."""
    if weight.kind == "bfloat16":
        rounded = x.to(torch.bfloat16).float()
    else:
        values = turn(x) if weight.uses_hadamard else x.float()
        rounded = _rounded(values, weight.group, weight.activation_bits)
    stored = weight.rows if not weight.is_gated else -(-weight.rows // (BLOCK_ROWS // 2)) * BLOCK_ROWS
    pieces = [
        F.linear(rounded, unpack(weight, first, first + _ROWS_AT_ONCE))
        for first in range(0, stored, _ROWS_AT_ONCE)
    ]
    out = torch.cat(pieces, dim=1)
    if weight.is_gated:
        gate, value = stored_halves(weight, out)
        out = F.silu(gate) * value
    if weight.bias is not None:
        out = out + weight.bias
    return out.to(out_dtype)


def quantise_rows(x: torch.Tensor, group: int, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """x: (M, C) float32 -> whole numbers (M, groups, group) float32 and scales (M, groups) float32.

    Symmetric, the largest magnitude of a group becoming 127 (8 bits) or 127 * 128 (15 bits); the scale is NaN where a
    value of the group is not finite.
    """
    groups = F.pad(x, (0, -x.shape[1] % group)).view(len(x), -1, group)
    largest = groups.abs().amax(-1)
    is_finite = groups.isfinite().all(-1)
    is_usable = is_finite & (
        largest >= 2.0**-100
    )  # below, the reciprocal leaves float32: as the kernels, zeros
    limit = torch.full_like(largest, 127.0 if bits == 8 else 127.0 * 128.0)
    # NOTE: `127.0 / largest` would be a reciprocal times 127 in torch, which rounds twice.
    inverse = torch.where(is_usable, limit / largest, 0.0)
    q = torch.where(is_usable[..., None], (groups * inverse[..., None]).round(), 0.0)
    scale = torch.where(is_usable, largest / limit, 0.0)
    return q, torch.where(is_finite, scale, torch.nan)


def _rounded(x: torch.Tensor, group: int, bits: int) -> torch.Tensor:
    q, scale = quantise_rows(x, group, bits)
    return (q * scale[..., None]).flatten(1)[:, : x.shape[1]]
