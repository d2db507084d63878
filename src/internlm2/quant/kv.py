"""Keys and values in int8: one float32 scale per token and head, so a token is packed once and never again."""

import torch

_LARGEST = 127
_SMALLEST_SCALE = 1e-20  # of an all-zero head


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x: (..., D) -> int8 of the same shape, and scales (...,) float32. The error is at most half a scale."""
    x32 = x.float()
    scale = (x32.abs().amax(-1) / _LARGEST).clamp(min=_SMALLEST_SCALE)
    return (x32 / scale[..., None]).round().to(torch.int8), scale


def dequantize(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """packed: (..., D) int8, scale: (...,) float32 -> (..., D) of `dtype`."""
    return (packed * scale[..., None]).to(dtype)
